"""Rows that are run again: in the end the results are those of a job in which nothing failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.batch.results.retries import merge_retries
from llama_runtime.errors import CaravanError
from tests.runtime.batch.jobs import OPENAI, PROMPTS, made_up

NUM_ROWS = 14
FAILED = {0, 3, 4, 9, 13}
STILL_FAILED = {4}

AGAIN = [9, 0, 13, 4, 3]  # as they end


@pytest.fixture(params=[PROMPTS, OPENAI], ids=["one file", "two files"])
def form(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


def line_of(form: Format, index: int, failed: set[int], text: str = "") -> bytes:
    return made_up(form, index, fails=index in failed, text=text).line


def files_of(form: Format, failed: set[int]) -> list[bytes]:
    """The result files of a job in which these rows failed."""
    apart = failed if form.errors_apart else set()
    files: list[list[bytes]] = [[], []]
    for index in range(NUM_ROWS):
        files[index in apart].append(line_of(form, index, failed))
    return [b"".join(lines) for lines in files]


def folder_of(tmp_path: Path, form: Format, retried: bytes) -> JobFolder:
    folder = JobFolder(tmp_path / "out.jsonl")
    folder.path.mkdir(exist_ok=True)
    output, errors = files_of(form, FAILED)
    folder.output.write_bytes(output)
    if form.errors_apart:
        folder.errors.write_bytes(errors)
    folder.retries.write_bytes(retried)
    return folder


def contents(folder: JobFolder) -> list[bytes]:
    paths = (folder.output, folder.errors)
    return [path.read_bytes() if path.exists() else b"" for path in paths]


def retried(form: Format) -> bytes:
    return b"".join(line_of(form, index, STILL_FAILED) for index in AGAIN)


def check(found: list[bytes], expected: list[bytes], *, ordered: bool) -> None:
    if ordered:
        assert found == expected
    else:
        for one, other in zip(found, expected, strict=True):
            assert sorted(one.splitlines()) == sorted(other.splitlines())


@pytest.mark.parametrize("ordered", [True, False])
def test_new_results_take_the_place_of_the_old_ones(
    form: Format, tmp_path: Path, ordered: bool
) -> None:
    folder = folder_of(tmp_path, form, retried(form))
    merge_retries(folder, form, ordered=ordered)
    check(contents(folder), files_of(form, STILL_FAILED), ordered=ordered)
    assert not folder.retries.exists()
    assert [path.name for path in folder.path.iterdir()] == []


def test_a_link_to_the_results_stays_a_link(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, PROMPTS, retried(PROMPTS))
    elsewhere = tmp_path / "elsewhere.jsonl"
    folder.output.rename(elsewhere)
    folder.output.symlink_to(elsewhere)
    merge_retries(folder, PROMPTS, ordered=True)
    assert folder.output.is_symlink()
    assert elsewhere.read_bytes() == files_of(PROMPTS, STILL_FAILED)[0]


@pytest.mark.parametrize("ordered", [True, False])
def test_what_was_not_run_again_in_time_stays_as_it_was(
    form: Format, tmp_path: Path, ordered: bool
) -> None:
    """A run that is killed while it runs rows again leaves a torn line."""
    data = retried(form)
    ends = [end + 1 for end in range(len(data)) if data[end : end + 1] == b"\n"]
    for length in (0, ends[0] - 1, ends[0], ends[1] + 7, ends[2] - 2, len(data) - 1):
        folder = folder_of(tmp_path, form, data[:length])
        merge_retries(folder, form, ordered=ordered)
        whole = AGAIN[: sum(end <= length for end in ends)]
        left = (FAILED - set(whole)) | STILL_FAILED
        check(contents(folder), files_of(form, left), ordered=ordered)


class Stop(Exception):  # noqa: N818 - as if the process had been killed
    pass


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after it"])
def test_a_merge_that_is_interrupted_anywhere_is_done_by_the_next_run(
    form: Format, tmp_path: Path, ordered: bool, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(act: Callable[..., Any], at: int, count: list[int]) -> Callable[..., Any]:
        def step(*args: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == at and not after:
                raise Stop
            found = act(*args, **options)
            if count[0] == at:
                raise Stop
            return found

        return step

    for at in range(1, 20):
        folder, count = folder_of(tmp_path, form, retried(form)), [0]
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stopping(os.replace, at, count))
            patch.setattr(os, "fsync", stopping(os.fsync, at, count))
            patch.setattr(Path, "unlink", stopping(Path.unlink, at, count))
            try:
                merge_retries(folder, form, ordered=ordered)
            except Stop:
                pass
            else:
                assert at > count[0] >= 3
                return
        if folder.retries.exists():
            merge_retries(folder, form, ordered=ordered)
        check(contents(folder), files_of(form, STILL_FAILED), ordered=ordered)
    raise AssertionError("the merge never ended")


def test_a_result_file_that_was_changed_is_not_written_anew(form: Format, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, form, retried(form))
    lines = folder.output.read_bytes().splitlines(keepends=True)
    changed = b"".join([*lines[:2], b"oops\n", *lines[2:]])
    folder.output.write_bytes(changed)
    with pytest.raises(CaravanError, match=r"out\.jsonl has no whole result at byte"):
        merge_retries(folder, form, ordered=True)
    assert folder.output.read_bytes() == changed
    assert folder.retries.exists()
