"""Programs of others that ask the server, each in a virtual environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from llama_runtime.bundle import open_bundle

DEFAULT_FOLDER = Path.home() / ".cache" / "caravan" / "conformance"
_CHARACTERS = 3000  # of what a program says when it fails


def program(folder: Path, name: str, *packages: str) -> Path:
    """The path of a program, which is installed if it isn't there.

    Args:
        folder: of the environments.
        name: of the program.
        packages: as pip takes them.
    """
    home = folder / name
    found = home / "bin" / name
    if not found.exists():
        print(f"installing {' '.join(packages)} into {home}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        command = [str(home / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, *packages], check=True)
    return found


def output_of(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a program says; it must end with status 0.

    Args:
        command: the program and what it is told.
        folder: where it runs, and keeps what it wants to.
        environment: beside what is set.

    Raises:
        RuntimeError: it ends with another.
    """
    homes = {"HF_HOME": str(folder / "hf"), "HOME": str(folder), "NO_COLOR": "1"}
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **homes, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode:
        said = ended.stdout[-_CHARACTERS:]
        raise RuntimeError(f"{command[0]} ended with {ended.returncode}: {said}")
    return ended.stdout


def write_tokenizer(bundle: Path, folder: Path) -> Path:
    """The tokenizer of a bundle as a folder that ``transformers`` reads."""
    opened = open_bundle(bundle)
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((bundle / "tokenizer.json").read_bytes())
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= opened.manifest.special_tokens
    template = bundle / "chat_template.jinja"
    if template.exists():
        config["chat_template"] = template.read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
