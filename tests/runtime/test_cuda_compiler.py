"""Kernels are compiled once: in a process, and for the processes that follow."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_runtime.backends import cuda_compiler
from llama_runtime.backends.cuda_compiler import machine_code
from llama_runtime.errors import BackendError

CAPABILITY = (9, 0)


class Code(int):
    name = "NVRTC_ERROR_COMPILATION"


class FakeNvrtc:
    """Its machine code is the flags and the source; a source with "error" in it is wrong."""

    def __init__(self) -> None:
        self.compiled: list[bytes] = []
        self.version = (0, 13, 0)
        self._source, self._output = b"", b""

    def nvrtcVersion(self) -> tuple[int, int, int]:  # noqa: N802
        return self.version

    def nvrtcCreateProgram(self, source: bytes, *_: Any) -> tuple[int, str]:  # noqa: N802
        self._source = source
        return 0, "program"

    def nvrtcCompileProgram(self, _: str, count: int, flags: list[bytes]) -> tuple[int]:  # noqa: N802
        assert count == len(flags)
        if b"error" in self._source:
            self._output = b"kernels.cu(1): error: so it goes"
            return (Code(6),)
        self._output = b"|".join([*flags, self._source])
        self.compiled.append(self._output)
        return (0,)

    def size(self, _: str) -> tuple[int, int]:
        return 0, len(self._output)

    nvrtcGetCUBINSize = nvrtcGetProgramLogSize = size  # noqa: N815

    def write(self, _: str, target: bytes) -> tuple[int]:
        """Into memory that Python believes to be constant, as the bindings do."""
        import ctypes

        ctypes.memmove(target, self._output, len(self._output))  # type: ignore[arg-type]
        return (0,)

    nvrtcGetCUBIN = nvrtcGetProgramLog = write  # noqa: N815

    def nvrtcDestroyProgram(self, _: str) -> tuple[int]:  # noqa: N802
        return (0,)


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeNvrtc:
    fake = FakeNvrtc()
    modules = SimpleNamespace(), SimpleNamespace(), fake
    monkeypatch.setattr(cuda_compiler, "import_cuda", lambda: modules)
    monkeypatch.setattr(cuda_compiler, "cache_folder", lambda: tmp_path / "cache")
    cuda_compiler._machine_code.cache_clear()
    return fake


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "kernels").iterdir())


def test_flags_are_for_the_device_and_defines_are_macros(nvrtc: FakeNvrtc) -> None:
    code = machine_code("source", CAPABILITY, ["FLOAT16", "SCALE_BITS=44"])
    assert code == (
        b"--gpu-architecture=sm_90|--std=c++17|-default-device|-DFLOAT16|-DSCALE_BITS=44|source"
    )


def test_it_is_compiled_once_and_kept_for_the_next_process(
    nvrtc: FakeNvrtc, tmp_path: Path
) -> None:
    first = machine_code("source", CAPABILITY, [])
    assert machine_code("source", CAPABILITY, []) == first
    cuda_compiler._machine_code.cache_clear()  # as in another process
    assert machine_code("source", CAPABILITY, []) == first
    assert len(nvrtc.compiled) == 1
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("what", ["source", "capability", "defines", "version"])
def test_whatever_differs_is_compiled_anew(nvrtc: FakeNvrtc, what: str) -> None:
    machine_code("source", CAPABILITY, ["A"])
    cuda_compiler._machine_code.cache_clear()
    if what == "version":
        nvrtc.version = (0, 13, 1)
    machine_code(
        "other" if what == "source" else "source",
        (8, 0) if what == "capability" else CAPABILITY,
        ["B"] if what == "defines" else ["A"],
    )
    assert len(nvrtc.compiled) == 2


@pytest.mark.parametrize("damage", [b"", b"short", b"\0" * 100])
def test_a_damaged_file_is_not_used(nvrtc: FakeNvrtc, tmp_path: Path, damage: bytes) -> None:
    first = machine_code("source", CAPABILITY, [])
    kept(tmp_path)[0].write_bytes(damage)
    cuda_compiler._machine_code.cache_clear()
    assert machine_code("source", CAPABILITY, []) == first
    assert len(nvrtc.compiled) == 2


def test_a_folder_that_cannot_be_written_costs_only_time(
    nvrtc: FakeNvrtc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cuda_compiler, "cache_folder", lambda: tmp_path / "file")
    assert machine_code("source", CAPABILITY, []).endswith(b"|source")


def test_what_does_not_compile_says_why(nvrtc: FakeNvrtc, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"don't compile: kernels.cu\(1\): error: so it goes$"):
        machine_code("an error", CAPABILITY, [])
    assert not (tmp_path / "cache").exists()
