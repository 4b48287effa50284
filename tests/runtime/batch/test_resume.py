"""``llama-run batch`` again: it goes on, and refuses what is another job."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.forms.prompt_format import PromptFormat
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.batch.results import output_file
from llama_runtime.batch.rows.scan import Scan
from llama_runtime.errors import CaravanError
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
from tests.runtime.conftest import write_fake_bundle

# --- going on -------------------------------------------------------------------------------------


def test_the_same_command_goes_on_and_then_has_nothing_to_do(
    run: Run,
    killed_after: KilledAfter,
    rows: Path,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    task = PromptFormat.task

    def counting(self: PromptFormat, record: Record) -> Any:
        asked.append(record.index)
        return task(self, record)

    output = tmp_path / "out.jsonl"
    command = (rows, *OPTIONS, "-o", output, "--max-len", 200)
    monkeypatch.setattr(PromptFormat, "task", counting)
    ended = killed_after(9, *command)
    first = set(asked)
    ended += killed_after(12, *command)
    asked.clear()
    result = run(*command)
    assert f"going on: {len(ended)} of 34 rows are done" in result.stderr
    assert sorted(asked) == sorted(set(range(34)) - set(ended)), "nothing is asked for twice"
    assert first - set(ended) or len(set(ended)) == 21
    assert output.read_bytes() == whole
    assert result.exit_code == 1, "a row has failed"
    assert "34 rows (13 of them now), 1 failed" in result.stderr
    again = run(*command)
    assert again.stderr.splitlines()[-1] == f"nothing is left to do; results in {output}"
    assert (again.exit_code, output.read_bytes()) == (1, whole)
    summary = json.loads(JobFolder(output).summary.read_bytes())
    assert (summary["statistics"]["rows"], summary["statistics"]["failed"]) == (34, 1)


def test_without_an_order_it_goes_on_to_the_same_lines(
    run: Run, killed_after: KilledAfter, rows: Path, whole: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = (rows, *OPTIONS, "-o", output, "--unordered")
    killed_after(9, *command)
    killed_after(9, *command)
    run(*command)
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_rows_of_the_openai_api_go_on_with_their_errors_apart(
    run: Run, killed_after: KilledAfter, tmp_path: Path
) -> None:
    given = openai_rows(24)
    for i in (2, 3, 11, 23):
        assert isinstance(given[i], dict)
        given[i] = {**given[i], "method": "GET"}  # type: ignore[dict-item]
    (tmp_path / "rows.jsonl").write_bytes(jsonl(given))
    found = []
    for name, kills in (("whole.jsonl", ()), ("out.jsonl", (3, 5, 8))):
        command = (tmp_path / "rows.jsonl", *OPTIONS, "-o", tmp_path / name)
        for count in kills:
            killed_after(count, *command)
        assert run(*command).exit_code == 1
        folder = JobFolder(tmp_path / name)
        found.append([[untimed(x) for x in results_in(p)] for p in (folder.output, folder.errors)])
    assert found[0] == found[1]
    assert [len(lines) for lines in found[0]] == [20, 4]


def test_a_torn_line_is_cut_off_and_said(
    run: Run, rows: Path, whole: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "whole.jsonl"
    output.write_bytes(whole[:-9])
    result = run(rows, *OPTIONS, "-o", output)
    torn = len(whole.splitlines(keepends=True)[-1]) - 9
    assert f"a result that was not whole is cut off: {torn} bytes" in result.stderr
    assert output.read_bytes() == whole
    changed = whole.replace(b'"index": 7', b'"index": "7"')
    output.write_bytes(changed)
    assert "whole.jsonl was changed since this job wrote it" in refused(
        run(rows, *OPTIONS, "-o", output)
    )
    assert output.read_bytes() == changed


def test_a_full_disk_is_what_is_said_and_the_job_goes_on_when_there_is_room(
    run: Run, rows: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, room = tmp_path / "out.jsonl", 5000

    def write(file: BinaryIO, line: bytes) -> None:
        if output.exists() and output.stat().st_size > room:
            raise OSError(28, "No space left on device")
        written(file, line)

    def write_summary(self: JobFolder, summary: object) -> None:
        raise CaravanError("there is no room for a summary either")

    written = output_file._write_whole
    command = (rows, *OPTIONS, "-o", output)
    for more_room in (4000, 4000):
        with monkeypatch.context() as patch:
            patch.setattr(output_file, "_write_whole", write)
            patch.setattr(JobFolder, "write_summary", write_summary)
            result = run(*command)
        num_lines = output.read_bytes().count(b"\n")
        assert result.exit_code == 1
        stopped, error = result.stderr.splitlines()[-2:]
        assert stopped.startswith(f"stopped: the results of {num_lines} of 34 rows are in {output}")
        assert error == f"Error: can't write to {output}: No space left on device"
        room += more_room
    run(*command)
    assert output.read_bytes() == whole


# --- another job ----------------------------------------------------------------------------------


def test_another_job_is_refused_and_it_says_what_changed(
    run: Run, killed_after: KilledAfter, rows: Path, whole: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    base = (rows, *OPTIONS, "-o", output)
    killed_after(9, *base)
    before = output.read_bytes()
    other = write_fake_bundle(tmp_path / "other", eos_token_id=257)
    data = rows.read_bytes()
    for more, words in (
        (("--bundle", other), "the bundle changed"),
        (("--temperature", 0.5), "temperature was not given, and is 0.5"),
        (("--seed", 1), "seed was 0, and is 1"),
        (("--max-tokens", 41), "max_tokens was 40, and is 41"),
        (("--stop", "x"), "stop was not given, and is ['x']"),
        (("--chat",), "chat was False, and is True"),
        (("--unordered",), "unordered was False, and is True"),
        (("--max-len", 150), "max_len was not given, and is 150"),
        (("--allow-control-tokens",), "allow_control_tokens was False, and is True"),
    ):
        error = refused(run(*base, *more))
        assert f"was begun with something else: {words}. Run it as it was begun" in error
    for text, words in (
        (data + b"{}\n", f"the rows changed ({len(data):,} bytes then, {len(data) + 3:,} now)"),
        (data.replace(b"row 7", b"row 6"), "the rows changed (as many bytes, but other ones)"),
        (b"", "is empty: it has no prompts"),
    ):
        rows.write_bytes(text)
        assert words in refused(run(*base))
    assert output.read_bytes() == before
    rows.write_bytes(data)
    run(*base, "--max-batch", 3)  # how fast it is isn't what it is
    assert output.read_bytes() == whole


def test_options_of_every_kind_are_known_again(
    run: Run, killed_after: KilledAfter, rows: Path, tmp_path: Path
) -> None:
    for number, more in enumerate(
        [
            ("--stop-token-id", 5, "--stop-token-id", 9, "--stop", "a", "--include-stop"),
            ("--logit-bias", "5=-100", "--logit-bias", "7=1.5", "--min-tokens", 2, "--ignore-eos"),
            ("--choice", "red", "--choice", "blue"),
            ("--json-schema", '{"type": "boolean"}', "-n", 2, "--temperature", 0.7, "--top-p", 0.5),
            ("--regex", "[ab]+", "--logprobs", "--top-logprobs", 2, "--prompt-logprobs"),
            ("--repetition-penalty", 1.1, "--presence-penalty", -1, "--speculation", "on"),
        ]
    ):
        command = (rows, *OPTIONS, *more, "-o", tmp_path / f"{number}.jsonl")
        killed_after(9, *command)
        result = run(*command)
        assert "going on: 9 of 34 rows are done" in result.stderr, result.output
        assert run(*command, "--verify").exit_code == 0


def test_a_job_of_another_version_is_refused(run: Run, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(rows, *OPTIONS, "-o", output)
    job = JobFolder(output).path / "job.json"
    for text, words in (
        (job.read_text().replace('"version": 1', '"version": 99'), "is of version 99"),
        ("[]", "can't be read: it is no object"),
        ("{", "can't be read: Expecting"),
    ):
        job.write_text(text)
        assert words in refused(run(rows, *OPTIONS, "-o", output))
    assert run(rows, *OPTIONS, "-o", output, "--force").exit_code == 1


def test_a_second_run_on_one_output_is_refused(run: Run, rows: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for more in ((), ("--force",), ("--verify",), ("--retry-errors",)):
        with JobFolder(output).locked():
            if more in (("--verify",), ("--retry-errors",)):
                JobFolder(output).write({})
            error = refused(run(rows, *OPTIONS, "-o", output, *more))
            assert f"another run is writing to {output}: wait for it, or give" in error
            assert not output.exists()


@pytest.mark.parametrize("count", [20, 30, 40])
def test_a_file_that_changes_while_its_rows_run_is_noticed(
    run: Run, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are missing at the end must not look like a job that went well."""
    path, read = tmp_path / "rows.jsonl", Scan.read
    path.write_bytes(jsonl(mixed_rows(30)))

    def then_changed(*args: Any, **more: Any) -> None:
        read(*args, **more)
        path.write_bytes(jsonl(mixed_rows(count)).replace(b"row", b"ROW"))

    monkeypatch.setattr(Scan, "read", then_changed)
    result = run(path, *OPTIONS, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 1, result.output
    said = {
        20: ": it holds 20 of the 30 rows",
        30: ", and results may be of other rows",
        40: ": it holds more than the 30 rows",
    }
    assert f"changed while the job ran{said[count]}" in result.stderr
    indices = [line["index"] for line in results_in(tmp_path / "out.jsonl")]
    assert indices == list(range(min(count, 30)))


def test_a_file_system_without_locks_is_what_is_said(
    run: Run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    error = refused(run(rows, *OPTIONS, "-o", tmp_path / "out.jsonl"))
    assert "can't be locked against other runs: No locks available" in error
