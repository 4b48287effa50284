"""What the system says about itself, its processors, its memory and its GPUs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from llama_runtime import machine
from llama_runtime.collect_env.discreet import error_text
from llama_runtime.errors import one_line

Facts = Mapping[str, object]

# Those that choose kernels, as Linux writes them: first of x86, then of Arm.
FLAGS = (
    *("sse4_1", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "avx_vnni", "avx_vnni_int8", "amx_tile", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2"),
)
_SMI = ("name", "driver_version", "memory.total", "compute_cap")
_SMI_SECONDS = 20
_DRIVER = re.compile(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)")
_UNSAID = "the system doesn't say"


def system() -> Facts:
    """The operating system and its C library."""
    libc = " ".join(part for part in platform.libc_ver() if part)
    return {"system": platform.platform(), "distribution": _distribution(), "libc": libc or _UNSAID}


def processors() -> Facts:
    """The processors, what they can do, and how many this process may use."""
    info = list(_cpuinfo())
    names = [value for name, value in info if name == "model name"]
    listed = {
        flag for name, value in info if name in ("flags", "Features") for flag in value.split()
    }
    flags = [flag for flag in FLAGS if flag in listed]
    return {
        "architecture": platform.machine(),
        "name": one_line(names[0]) if names else (platform.processor() or _UNSAID),
        "flags": flags if listed else _UNSAID,
        "in_machine": os.cpu_count(),
        "by_affinity": machine.affinity(),
        "by_quota": machine.processor_quota(),
        "default_threads": machine.default_threads(),
    }


def memory() -> Facts:
    """Bytes of memory: the machine's, the container's, and what is left for this process."""
    left = machine.available_memory()
    return {
        "machine_bytes": machine.total_memory(),
        "container_limit_bytes": machine.container_memory(),
        "available_bytes": left.num_bytes,
        "bounded_by": left.bound,
    }


def gpus() -> Facts:
    """NVIDIA GPUs as ``nvidia-smi`` lists them, which makes no context on them.

    Returns:
        ``driver`` and ``devices``, a list of facts; ``error`` where they can't be listed.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        driver = _DRIVER.search(_text(machine.PROC / "driver" / "nvidia" / "version"))
        return {"driver": driver[1] if driver else None, "error": "there is no nvidia-smi"}
    command = [program, f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SMI_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"driver": None, "error": error_text(error)}
    if said.returncode:
        text = said.stdout.strip() or said.stderr.strip()
        return {
            "driver": None,
            "error": error_text(f"nvidia-smi ended with {said.returncode}: {text}"),
        }
    rows = [[cell.strip() for cell in line.split(",")] for line in said.stdout.splitlines()]
    devices = [dict(zip(_SMI, row, strict=True)) for row in rows if len(row) == len(_SMI)]
    return {
        "driver": devices[0]["driver_version"] if devices else None,
        "devices": [
            {
                "name": one_line(device["name"]),
                "memory_mib": device["memory.total"],
                "compute_capability": device["compute_cap"],
            }
            for device in devices
        ],
    }


def _text(path: Path) -> str:
    """The contents of a file of the kernel; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _distribution() -> str:
    try:
        return one_line(platform.freedesktop_os_release().get("PRETTY_NAME", _UNSAID))
    except OSError:
        return _UNSAID


def _cpuinfo() -> Iterator[tuple[str, str]]:
    """What the kernel says of the first processor."""
    for line in _text(machine.PROC / "cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if not name.strip():
            return  # the others are alike
        yield name.strip(), value.strip()
