"""Rows that failed are run again, and finished results are proved to be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llama_runtime import loading
from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.forms.openai_format import OpenAiFormat
from llama_runtime.batch.forms.prompt_format import PromptFormat
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.errors import RequestError
from tests.runtime.batch.jobs import (
    OPTIONS,
    KilledAfter,
    Run,
    jsonl,
    mixed_rows,
    openai_rows,
    refused,
    results_in,
    untimed,
)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("form", [PromptFormat, OpenAiFormat])
def test_rows_that_failed_are_run_again(
    run: Run, tmp_path: Path, ordered: bool, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the end all is as if nothing had failed, but for a row that fails again."""
    given = mixed_rows(20) if form is PromptFormat else openai_rows(20)
    given[8] = {"custom_id": "bad"} if form is OpenAiFormat else "{bad"
    path = tmp_path / "rows.jsonl"
    path.write_bytes(jsonl(given))
    more = () if ordered else ("--unordered",)
    task, unlucky = form.task, {2, 3, 14, 19}

    def failing(self: Any, record: Record) -> Any:
        if record.index in unlucky:
            raise RequestError("not now", param="prompt")
        return task(self, record)

    def lines(folder: JobFolder) -> list[list[dict[str, Any]]]:
        files = [folder.output, folder.errors]
        found = [results_in(file) if file.exists() else [] for file in files]
        if form is OpenAiFormat:
            found = [[untimed(line) for line in file] for file in found]
        if not ordered:
            found = [sorted(file, key=lambda line: str(line)) for file in found]
        return found

    whole, out = JobFolder(tmp_path / "whole.jsonl"), JobFolder(tmp_path / "out.jsonl")
    run(path, *OPTIONS, *more, "-o", whole.output)
    base = (path, *OPTIONS, *more, "-o", out.output, "--max-len", 200)
    with monkeypatch.context() as patch:
        patch.setattr(form, "task", failing)
        result = run(*base)
        assert "20 rows, 5 failed" in result.stderr
        unlucky -= {2}
        result = run(*base, "--retry-errors")  # one is luckier now
        assert "running the 5 rows again that failed" in result.stderr
        assert "1 of 5 went well this time" in result.stderr
    result = run(*base, "--retry-errors")
    assert "running the 4 rows again that failed" in result.stderr
    assert "3 of 4 went well this time" in result.stderr
    assert result.exit_code == 1
    assert lines(out) == lines(whole)
    assert run(*base, "--verify").exit_code == 0
    assert "there is no job of" in refused(run(path, *OPTIONS, "--retry-errors"))


def test_a_run_that_is_killed_while_it_runs_rows_again_goes_on(
    run: Run, killed_after: KilledAfter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(jsonl(mixed_rows(30)))
    run(path, *OPTIONS, "-o", tmp_path / "whole.jsonl")
    base = (path, *OPTIONS, "-o", output, "--max-len", 200)
    task = PromptFormat.task

    def failing(self: PromptFormat, record: Record) -> Any:
        if record.index % 2:
            raise RequestError("not now", param="prompt")
        return task(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(PromptFormat, "task", failing)
        run(*base)
    again = killed_after(4, *base, "--retry-errors")
    again += killed_after(5, *base, "--retry-errors")
    result = run(*base, "--retry-errors")
    assert len(set(again)) == 9, "what was done in time isn't done again"
    assert "running the 6 rows again that failed" in result.stderr
    assert result.exit_code == 0
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_verifying_says_whether_the_results_are_those_of_the_rows(
    run: Run, rows: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "open_session", None)  # nothing is run
    output = tmp_path / "whole.jsonl"
    base = (rows, *OPTIONS, "-o", output, "--verify")
    result = run(*base)
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == (
        f"34 rows have one result each, in its place, 1 of them an error: {output}"
    )
    lines = whole.splitlines(keepends=True)
    for changed, words in (
        (lines[:-1], "row 33 has no result"),
        ([*lines, lines[4]], "row 4 has two results"),
        ([lines[1], lines[0], *lines[2:]], "has row 0 behind row 1"),
        ([lines[0].replace(b"row 0", b"row 1"), *lines[1:]], "row 0 is that of another row"),
    ):
        output.write_bytes(b"".join(changed))
        result = run(*base)
        assert (result.exit_code, output.read_bytes()) == (1, b"".join(changed))
        assert words in result.stderr.splitlines()[-1]
    assert "there is no job of" in refused(run(rows, *OPTIONS, "--verify"))


def test_rows_of_parquet_run_as_those_of_json_do(run: Run, tmp_path: Path) -> None:
    """Its columns hold a null wherever another row has something."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": "a", "name": "x"}]
    turns += [{"role": "user", "content": "b"}]
    given: list[dict[str, Any]] = [{"messages": [turn], "max_tokens": 5} for turn in turns]
    given += [{"prompt": "c"}, {"prompt": "d", "stop": ["x"], "id": "mine"}]
    (tmp_path / "rows.jsonl").write_bytes(jsonl([*given]))
    keys = ("messages", "max_tokens", "prompt", "stop", "id")
    table = pyarrow.Table.from_pylist([{key: row.get(key) for key in keys} for row in given])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    found = []
    for name in ("rows.jsonl", "rows.parquet"):
        output = tmp_path / f"{name}.results"
        result = run(tmp_path / name, *OPTIONS, "-o", output)
        assert result.exit_code == 0, result.output
        assert run(tmp_path / name, *OPTIONS, "-o", output, "--verify").exit_code == 0
        found.append([{**line, "prompt": None} for line in results_in(output)])
    assert found[0] == found[1]


def test_a_page_about_a_finished_job_can_be_had_later(
    run: Run, rows: Path, whole: bytes, tmp_path: Path
) -> None:
    base = (rows, *OPTIONS, "-o", tmp_path / "whole.jsonl")
    assert run(*base, "--report", tmp_path / "kept.html").exit_code == 1
    (tmp_path / "whole.jsonl.job" / "summary.json").unlink()
    assert run(*base, "--report", tmp_path / "made.html").exit_code == 1
    assert "max batch" in (tmp_path / "kept.html").read_text()
    for name in ("kept.html", "made.html"):
        assert "fake-llama" in (tmp_path / name).read_text()
        assert "<dd>34</dd>" in (tmp_path / name).read_text()
    assert "leave" in refused(run(*base, "--verify", "--report", tmp_path / "no.html"))
    assert "would replace" in refused(run(*base, "--report", rows))
