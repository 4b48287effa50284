"""Where a benchmark ran, and on what."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

from llama_runtime import __version__
from llama_runtime.machine import default_threads

ROOT = Path(__file__).resolve().parents[1]

Results = dict[str, Any]


def machine() -> Results:
    """Processor, versions and commit."""
    return {"machine": _processor(), "versions": _versions(), "commit": _commit()}


def _processor() -> Results:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"cpu": names[0] if names else platform.machine(), "processors": default_threads()}


def _versions() -> Results:
    versions: Results = {"caravan": __version__, "python": platform.python_version()}
    for name in ("onnxruntime", "onnxruntime-genai", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
