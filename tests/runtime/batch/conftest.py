"""``llama-run batch`` in this process, on the fake bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llama_runtime.batch.job import Job
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.cli import cli
from tests.runtime.batch.jobs import OPTIONS, jsonl, mixed_rows

Run = Callable[..., Result]


@pytest.fixture
def run(fake_backend: None, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``llama-run batch`` with these arguments."""
    monkeypatch.setenv("LLAMA_RUN_BUNDLE", os.fspath(fake_bundle))

    def run(*args: object, stdin: bytes | None = None) -> Result:
        given = ["batch", *map(str, args), "--threads", "1"]
        return CliRunner().invoke(cli, given, input=stdin, prog_name="llama-run")

    return run


class Killed(BaseException):
    """As if the process had been killed."""


@pytest.fixture
def killed_after(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Runs the command until so many rows have ended; the rows that did."""

    def killed_after(count: int, *args: object, stdin: bytes | None = None) -> list[int]:
        ended: list[int] = []

        def finish(self: Job, outcome: Outcome) -> None:
            if len(ended) == count:
                raise Killed
            finished(self, outcome)
            ended.append(outcome.index)

        with monkeypatch.context() as patch:
            finished = Job._finish
            patch.setattr(Job, "_finish", finish)
            with pytest.raises(Killed):
                run(*args, stdin=stdin)
        return ended

    return killed_after


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl([*mixed_rows(30), "{broken", *mixed_rows(3)]))
    return path


@pytest.fixture
def whole(run: Run, rows: Path, tmp_path: Path) -> bytes:
    """What an uninterrupted run writes."""
    output = tmp_path / "whole.jsonl"
    result = run(rows, *OPTIONS, "-o", output)
    assert result.exit_code == 1, result.output
    return output.read_bytes()
