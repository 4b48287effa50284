"""A slice of scripts/prove_interrupts: an interrupt at any moment loses nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("reads /proc to see when a process takes signals", allow_module_level=True)

from tests.hostile.interrupts import interrupt_batches, interrupt_builds, run_interrupted

BUILD_SECONDS = 7.0


@pytest.mark.alone
def test_interrupted_batches_leave_whole_lines(tiny_bundle: Path, tmp_path: Path) -> None:
    bad, outcomes = interrupt_batches(tmp_path, tiny_bundle, 7, random.Random(1))
    assert not bad
    assert len(outcomes) > 2, "they should end in several ways"


def test_interrupted_builds_leave_what_was_there(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    bad, _ = interrupt_builds(
        tmp_path, tiny_bundle, 1, random.Random(2), model=tiny_model, seconds=BUILD_SECONDS
    )
    assert not bad


def test_an_interrupt_in_the_middle_of_a_build_removes_what_was_built(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    build = subprocess.Popen(
        [
            *(sys.executable, "-m", "llama_export", "build", str(tiny_model), "--force"),
            *("--output", str(output), "--quiet"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    while build.poll() is None and not list(tmp_path.glob(".bundle.building-*/decoder.onnx")):
        time.sleep(0.01)
    build.send_signal(signal.SIGTERM)
    _, said = build.communicate(timeout=60)
    assert (build.returncode, said) == (
        128 + signal.SIGTERM,
        "interrupted: nothing was left behind\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.parametrize("module", ["llama_runtime", "llama_export"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_it_starts_is_one_line(
    module: str, sent: signal.Signals, tiny_model: Path
) -> None:
    """The export then imports torch, for seconds."""
    status, said = run_interrupted([module, "inspect", str(tiny_model)], sent, 0.005)
    assert (status, said) == (128 + sent, "interrupted\n")


def test_what_is_to_be_ignored_is_ignored(tiny_bundle: Path, tmp_path: Path) -> None:
    """As of ``nohup``, or of a job in the background of a script."""
    (tmp_path / "p.txt").write_text("a\n" * 20)
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "llama_runtime", "batch", str(tmp_path / "p.txt"), "-q"),
            *("--bundle", str(tiny_bundle), "--max-tokens", "20"),
        ],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    while run.poll() is None:
        run.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert run.returncode == 0
    assert (tmp_path / "p.results.jsonl").read_text().count("\n") == 20


def test_a_build_that_was_killed_is_cleared_away_by_the_next(
    tiny_model: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    from llama_export.output_folder import new_directory

    abandoned = tmp_path / ".bundle.building-0123"
    shutil.copytree(tiny_bundle, abandoned)
    os.utime(abandoned, (0, 0))
    with new_directory(tmp_path / "bundle") as first:
        assert not abandoned.exists()
        os.utime(first, (0, 0))
        with new_directory(tmp_path / "bundle") as second:  # beside another that is at work
            assert first.exists()
            (second / "file").write_text("second")
    assert {path.name for path in tmp_path.iterdir()} == {"bundle"}
