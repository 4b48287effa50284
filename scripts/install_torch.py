#!/usr/bin/env python3
"""Install a CPU build of torch into this interpreter's environment, its size said first.

usage: scripts/install_torch.py

On Linux the package index's own torch brings gigabytes of CUDA libraries, which neither building
nor running a bundle on the CPU needs. So pip is asked what it would take; if that is no CPU
build, uv is asked for one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import urllib.parse
import urllib.request

TORCH = "torch==2.13.0"  # the release the tests run with; the package itself takes 2.11 and newer
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def main() -> None:
    """Install torch unless a usable one is there."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version:
        print(f"torch {version} is installed")
        return
    wheel = wheel_of_pip()
    if wheel is not None:
        print(f"installing {TORCH} for the CPU ({wheel_megabytes(wheel)})")
        command = [*PIP, "install", TORCH]
    else:
        print(f"installing {TORCH} for the CPU with uv (about 200 MB)")
        subprocess.run([*PIP, "install", "uv"], check=True)
        command = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable]
        command += ["--torch-backend", "cpu", TORCH]
    sys.stdout.flush()
    sys.exit(subprocess.run(command, check=False).returncode)


def wheel_of_pip() -> str | None:
    """Address of the CPU build that pip would take, or None if it would take another."""
    report = subprocess.run(
        [*PIP, "install", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", TORCH],
        capture_output=True,
        text=True,
        check=False,
    )
    if report.returncode != 0:
        return None
    (item,) = json.loads(report.stdout)["install"]
    only_cpu = platform.system() != "Linux" or platform.machine() == "aarch64"
    if only_cpu or item["metadata"]["version"].endswith("+cpu"):
        return str(item["download_info"]["url"])
    return None


def wheel_megabytes(url: str) -> str:
    """The size of a wheel in words."""
    parts = urllib.parse.urlsplit(url)
    try:
        if parts.scheme == "file":
            size = os.path.getsize(urllib.request.url2pathname(parts.path))
        else:
            head = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(head, timeout=10) as answer:
                size = int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return "size unknown"
    return f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
