"""Streams: kept, so that their job can go on; or not, and it says so."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from llama_runtime.batch.job_folder import JobFolder
from tests.runtime.batch.jobs import (
    OPTIONS,
    KilledAfter,
    Run,
    refused,
    results_in,
)


def test_a_stream_is_kept_and_may_come_again_or_not(
    run: Run, killed_after: KilledAfter, rows: Path, whole: bytes, tmp_path: Path
) -> None:
    data = rows.read_bytes()
    for number, (first, again) in enumerate(
        [(data, data), (data, b""), (gzip.compress(data), b"")]
    ):
        output = tmp_path / f"{number}.jsonl"
        base = ("-", *OPTIONS, "-o", output)
        killed_after(9, *base, stdin=first)
        before = output.read_bytes()
        error = refused(run(*base, stdin=data + b"{}\n"))
        assert "standard input holds other rows than those that the job was begun with" in error
        assert output.read_bytes() == before
        run(*base, stdin=again)
        assert output.read_bytes() == whole
        assert run(*base, "--verify", stdin=b"").exit_code == 0


def test_a_run_that_is_killed_while_it_keeps_a_stream_leaves_no_job(
    run: Run, rows: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, data = tmp_path / "out.jsonl", rows.read_bytes()
    base = ("-", *OPTIONS, "-o", output)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, killed)
            run(*base, stdin=data[: len(data) // 2])
        assert not output.exists()
    run(*base, stdin=data)
    assert output.read_bytes() == whole


def test_a_stream_that_can_not_be_kept_is_one_sentence(
    run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = run("-", *OPTIONS, "-o", tmp_path / "out.jsonl", stdin=rows.read_bytes())
    assert result.exit_code == 1
    assert result.stderr.endswith("Error: standard input can't be kept: No space left on device\n")


def test_without_keeping_a_stream_it_says_what_that_costs(
    run: Run, rows: Path, whole: bytes, tmp_path: Path
) -> None:
    output, data = tmp_path / "out.jsonl", rows.read_bytes()
    base = ("-", *OPTIONS, "-o", output, "--no-spool", "--max-len", 200)
    result = run(*base, stdin=data)
    assert (
        "standard input is not kept: the job can't be resumed, and ids that come twice go unnoticed"
    ) in result.stderr
    assert "the same command goes on" not in result.stderr
    assert output.read_bytes() == whole
    assert not JobFolder(output).path.exists()
    assert "exists, and is not that of a job" in refused(run(*base, stdin=data))
    run(*base, "--force", stdin=data)
    assert output.read_bytes() == whole
    for more in ("--verify", "--retry-errors"):
        assert "give --output a file" in refused(run(*base, more, stdin=data))
    assert output.read_bytes() == whole


def test_a_stream_that_breaks_off_has_the_rows_before_it_done(run: Run, tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b"row %d %d\n" % (i, i**30) for i in range(400)))[:-30]
    output = tmp_path / "out.jsonl"
    base = ("-", "--max-tokens", 2, "--seed", 0, "-o", output)
    result = run(*base, "--no-spool", stdin=packed)
    found = results_in(output)
    assert [record["index"] for record in found] == list(range(len(found)))
    assert len(found) > 300
    assert result.stderr.splitlines()[-1] == (
        f"Error: the prompts can't be read beyond line {len(found)}: "
        "Compressed file ended before the end-of-stream marker was reached"
    )
    assert result.exit_code == 1, "2 says that nothing was run"
    output.unlink()
    assert "can't be read beyond line" in refused(run(*base, stdin=packed))
    assert not output.exists(), "one that is kept is looked at before any work"


def test_a_bad_line_of_a_compressed_stream_fails_alone(run: Run, tmp_path: Path) -> None:
    packed = gzip.compress(b"one\ntwo \xff\nthree\n")
    result = run("-", "-o", "-", "--max-tokens", 2, stdin=packed)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert [record["prompt"] for record in found] == ["one", None, "three"]
    assert "line 2 is not UTF-8 text: byte 0xFF at position 5" in found[1]["error"]
