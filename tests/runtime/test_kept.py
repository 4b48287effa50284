"""What TensorRT has found out, kept: read again if it is the user's own."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest

from llama_runtime.tensorrt.kept import load_kept, store_kept
from llama_runtime.tensorrt.library import Library

TENSORRT = Library("tensorrt", "10.16.1", None)
GPU = "NVIDIA L4, 8.9"
MEASURED = bytes(range(256)) * 5


@pytest.fixture(autouse=True)
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/llama-caravan/engines"


def kept(engines: Path) -> Path:
    (path,) = engines.glob("timing-*")
    return path


def test_they_are_read_again_on_the_same_gpu_by_the_same_version(engines: Path) -> None:
    assert load_kept("timing", TENSORRT, GPU) == b""
    store_kept("timing", TENSORRT, GPU, b"earlier")
    store_kept("timing", TENSORRT, GPU, MEASURED)
    assert load_kept("timing", TENSORRT, GPU) == MEASURED
    assert load_kept("timing", TENSORRT, "NVIDIA A100, 8.0") == b""
    assert load_kept("timing", Library("tensorrt", "10.17.0", None), GPU) == b""
    assert stat.S_IMODE(kept(engines).stat().st_mode) == 0o600
    assert len(list(engines.iterdir())) == 2  # with the secret, and nothing unfinished


def test_kinds_are_kept_apart_and_nothing_is_not_kept(engines: Path) -> None:
    store_kept("timing", TENSORRT, GPU, b"")
    assert not engines.exists()
    store_kept("runtime", TENSORRT, GPU, MEASURED)
    assert load_kept("timing", TENSORRT, GPU) == b""
    assert load_kept("runtime", TENSORRT, GPU) == MEASURED
    # One signed as the other is refused too.
    (path,) = engines.glob("runtime-*")
    path.rename(path.with_name(path.name.replace("runtime", "timing")))
    assert load_kept("timing", TENSORRT, GPU) == b""


def test_what_was_altered_or_given_is_left_aside(
    engines: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store_kept("timing", TENSORRT, GPU, MEASURED)
    whole = kept(engines).read_bytes()
    for content in (whole[:-1] + b"x", whole[:20], b"", MEASURED):
        kept(engines).write_bytes(content)
        with caplog.at_level(logging.WARNING, "llama_runtime"):
            assert load_kept("timing", TENSORRT, GPU) == b""
        assert "wasn't signed here" in caplog.text
        caplog.clear()
    kept(engines).write_bytes(whole)
    kept(engines).chmod(0o666)
    assert load_kept("timing", TENSORRT, GPU) == b""
    kept(engines).chmod(0o600)
    assert load_kept("timing", TENSORRT, GPU) == MEASURED
    (engines / "secret").unlink()
    assert load_kept("timing", TENSORRT, GPU) == b""
