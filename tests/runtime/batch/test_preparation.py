"""Beginning a job, or beginning it anew: what can't start destroys nothing."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from llama_runtime import loading
from llama_runtime.machine import Memory
from tests.runtime.batch.jobs import (
    OPTIONS,
    Given,
    KilledAfter,
    Run,
    jsonl,
    openai_rows,
    refused,
    results_in,
)


def test_names_that_come_twice_are_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "open_session", None)  # so that loading would fail
    doubled = openai_rows(9)
    doubled[7] = doubled[2]
    ids: list[Given] = [{"id": i % 7, "prompt": "a"} for i in range(8)]
    for given, words in ((doubled, "c2 of rows 2 and 7"), (ids, "0 of rows 0 and 7")):
        (tmp_path / "rows.jsonl").write_bytes(jsonl(given))
        for more in ((), ("-o", "-")):
            error = refused(run(tmp_path / "rows.jsonl", *OPTIONS, *more))
            assert words in error
        assert "1 row has the id of another one" in refused(
            run("-", *OPTIONS, "-o", tmp_path / "x.jsonl", stdin=jsonl(given))
        )
        assert not list(tmp_path.glob("*.results.jsonl"))


def test_a_job_that_never_began_leaves_nothing(run: Run, tmp_path: Path) -> None:
    for data in (b"", jsonl([{"id": 1, "prompt": "a"}] * 2)):
        (tmp_path / "rows.jsonl").write_bytes(data)
        before = sorted(tmp_path.iterdir())
        refused(run(tmp_path / "rows.jsonl", *OPTIONS))
        assert sorted(tmp_path.iterdir()) == before


def test_force_begins_anew(run: Run, rows: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "whole.jsonl"
    changed = (*OPTIONS, "--temperature", 1, "-o", output, "--force")
    assert run(rows, *changed).exit_code == 1
    assert len(results_in(output)) == 34
    assert output.read_bytes() != whole
    output.with_name("mine.jsonl").write_text("somebody's\n")
    mine = (rows, *OPTIONS, "-o", tmp_path / "mine.jsonl")
    assert "exists, and is not that of a job which could go on" in refused(run(*mine))
    assert (tmp_path / "mine.jsonl").read_text() == "somebody's\n"
    run(*mine, "--force")
    assert (tmp_path / "mine.jsonl").read_bytes() == whole


@pytest.mark.parametrize("from_stream", [False, True])
def test_force_destroys_nothing_if_the_new_job_can_not_start(
    run: Run,
    killed_after: KilledAfter,
    rows: Path,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    from_stream: bool,
) -> None:
    output, data = tmp_path / "out.jsonl", rows.read_bytes()
    name = "-" if from_stream else rows
    base = (name, *OPTIONS, "-o", output)
    killed_after(9, *base, stdin=data)
    before = output.read_bytes()

    def available_memory(mapped_bytes: int) -> Memory:
        return Memory(1000, "container")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "available_memory", available_memory)
        error = refused(run(*base, "--force", stdin=data))
        assert "are available (container)" in error
    doubled: list[Given] = [{"id": 1, "prompt": "a"}] * 2
    for given, more, words in (
        (data, ("--max-len", 513), "max_len must lie in"),
        (data, ("--max-tokens", 0), "max_tokens must lie in"),
        (data, ("--bundle", tmp_path / "nowhere"), "nowhere does not exist"),
        (jsonl(doubled), (), "the id of another one"),
        (b"", (), "is empty"),
        (b"\0", (), "is not text"),
        (gzip.compress(data)[:-20], (), "can't be read beyond"),
    ):
        rows.write_bytes(given)
        assert words in refused(run(*base, *more, "--force", stdin=given))
        assert output.read_bytes() == before
    rows.write_bytes(data)
    run(*base, stdin=b"")
    assert output.read_bytes() == whole


def test_a_file_of_errors_that_is_not_of_the_job_is_left_alone(
    run: Run, rows: Path, tmp_path: Path
) -> None:
    others = tmp_path / "out.errors.jsonl"
    others.write_text("somebody's\n")
    assert run(rows, *OPTIONS, "-o", tmp_path / "out.jsonl").exit_code == 1
    assert others.read_text() == "somebody's\n", "such rows have no errors apart"
    requests = tmp_path / "requests.jsonl"
    requests.write_bytes(jsonl(openai_rows(3)))
    mine = (*OPTIONS, "-o", tmp_path / "out.jsonl", "--no-spool", "--force")
    (tmp_path / "out.jsonl.job").rename(tmp_path / "old")
    for more in ((), ("--no-spool",)):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        found = run("-", *OPTIONS, "-o", tmp_path / "out.jsonl", *more, stdin=requests.read_bytes())
        assert f"{others} exists, and is not that of a job" in refused(found)
        assert others.read_text() == "somebody's\n"
    assert run("-", *mine, stdin=requests.read_bytes()).exit_code == 0
    assert not others.exists()
