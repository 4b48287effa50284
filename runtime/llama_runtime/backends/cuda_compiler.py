"""CUDA C++ to machine code, by NVRTC, and once for each source and device: it takes seconds."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from llama_runtime.backends.cuda_device import import_cuda
from llama_runtime.errors import BackendError
from llama_runtime.user_cache import cache_folder

_DIGEST_BYTES = 32  # of what follows it in a file, so that a damaged one isn't used


def machine_code(source: str, capability: tuple[int, int], defines: Sequence[str]) -> bytes:
    """Compile for a device, or find what was compiled before.

    Args:
        source: CUDA C++ that includes nothing.
        capability: the device's compute capability, major and minor.
        defines: macros, ``NAME`` or ``NAME=VALUE``.

    Raises:
        DependencyError: the bindings aren't installed.
        BackendError: it doesn't compile.
    """
    major, minor = capability
    # Lambdas with a generic parameter count as host functions unless told otherwise.
    flags = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "-default-device"]
    return _machine_code(source, (*flags, *(f"-D{define}" for define in defines)))


@cache
def _machine_code(source: str, flags: tuple[str, ...]) -> bytes:
    _, _, nvrtc = import_cuda()
    version = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
    key = hashlib.sha256("\0".join((version, *flags, source)).encode()).hexdigest()
    folder = cache_folder()
    path = None if folder is None else folder / "kernels" / f"{key}.cubin"
    found = None if path is None else _read(path)
    if found is None:
        found = _compile(source, flags)
        if path is not None:
            _write(path, found)
    return found


def _compile(source: str, flags: Sequence[str]) -> bytes:
    _, _, nvrtc = import_cuda()
    error, program = nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], [])
    if int(error):
        raise BackendError(f"NVRTC failed: {error.name}")
    try:
        options = [flag.encode() for flag in flags]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(error):
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = b" " * size  # which is written into
            nvrtc.nvrtcGetProgramLog(program, log)
            text = log.decode(errors="replace").strip(" \0")
            raise BackendError(f"the kernels don't compile: {text}")
        _, size = nvrtc.nvrtcGetCUBINSize(program)
        binary: bytes = b" " * size
        nvrtc.nvrtcGetCUBIN(program, binary)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return binary


def _read(path: Path) -> bytes | None:
    """What was compiled, if it is there and whole."""
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        digest, binary = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(binary).digest() == digest:
            return binary
    return None


def _write(path: Path, binary: bytes) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # it only saves time
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(hashlib.sha256(binary).digest() + binary)
        unfinished.replace(path)
