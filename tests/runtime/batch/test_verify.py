"""Verifying finds whatever is wrong with results, and nothing wrong with those that are right."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.results.verify import Verdict, verify
from llama_runtime.errors import CaravanError
from tests.runtime.batch.jobs import OPENAI, PROMPTS, Given, jsonl, made_up, records_of

NUM_ROWS = 12
FAILED = {2, 5, 6, 9}
Lines = list[bytes]


def rows_of(form: Format) -> list[Given]:
    if form is PROMPTS:
        return [{"prompt": f"p{index}"} for index in range(NUM_ROWS)]
    return [{"custom_id": f"c{index}"} for index in range(NUM_ROWS)]


def verdict_on(
    form: Format, lines: Lines, errors: Lines, folder: Path, *, ordered: bool = True
) -> Verdict:
    paths = [folder / "out", folder / "errors"]
    for path, written in zip(paths, (lines, errors), strict=True):
        path.write_bytes(b"".join(written))
    data = jsonl(rows_of(form))
    scratch = folder / "echoes"
    found = verify(records_of(data), NUM_ROWS, form, paths, scratch, ordered=ordered)
    assert not scratch.exists()
    return found


def right(form: Format) -> tuple[Lines, Lines]:
    apart = FAILED if form.errors_apart else set()
    lines: tuple[Lines, Lines] = ([], [])
    for index in range(NUM_ROWS):
        lines[index in apart].append(made_up(form, index, fails=index in FAILED).line)
    return lines


@pytest.fixture(params=[PROMPTS, OPENAI], ids=["one file", "two files"])
def form(request: pytest.FixtureRequest) -> Format:
    found: Format = request.param
    return found


def test_what_is_right_passes(form: Format, tmp_path: Path) -> None:
    for ordered in (True, False):
        found = verdict_on(form, *right(form), tmp_path, ordered=ordered)
        assert (found.rows, found.failed, found.num_faults, found.faults) == (12, 4, 0, [])
    lines, errors = right(form)
    assert verdict_on(form, lines[::-1], errors[::-1], tmp_path, ordered=False).num_faults == 0


def _without(lines: Lines) -> Lines:
    return lines[:3] + lines[4:]


def _doubled(lines: Lines) -> Lines:
    return [*lines, lines[3]]


def _swapped(lines: Lines) -> Lines:
    return [lines[1], lines[0], *lines[2:]]


def _torn(lines: Lines) -> Lines:
    return [*lines[:-1], lines[-1][:-5]]


def _of_another(lines: Lines) -> Lines:
    """A result under the index of another row."""
    changed = [line.replace(b'"p0"', b'"p9"').replace(b'"c0"', b'"c9"') for line in lines]
    assert changed != lines
    return changed


def _too_many(lines: Lines) -> Lines:
    more = [line.replace(b'"index": 11', b'"index": 12') for line in lines[-1:]]
    return lines + [line.replace(b"000000000011", b"000000000012") for line in more]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without, "has no result"),
        (_doubled, "has two results"),
        (_swapped, "out has row 0 behind row 1"),
        (_torn, "out has no whole result at byte"),
        (_of_another, "the result of row 0 is that of another row"),
        (_too_many, "out has a result of row 12, and there are 12 rows"),
    ],
)
def test_each_fault_is_found_and_named(
    form: Format, tmp_path: Path, change: Callable[[Lines], Lines], words: str
) -> None:
    lines, errors = right(form)
    found = verdict_on(form, change(lines), errors, tmp_path)
    assert found.num_faults >= 1
    assert any(words in fault for fault in found.faults), found.faults
    if change is not _torn:  # which misses its row besides
        assert found.num_faults == 1


def test_a_row_in_both_files_has_two_results(tmp_path: Path) -> None:
    lines, errors = right(OPENAI)
    found = verdict_on(OPENAI, lines, [*errors, lines[-1]], tmp_path)
    assert found.faults == ["row 11 has two results"]


def test_faults_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    found = verdict_on(PROMPTS, [], [], tmp_path)
    assert (found.num_faults, len(found.faults)) == (NUM_ROWS, 5)
    assert found.faults[0] == "row 0 has no result"


def test_an_echo_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    """Keys in another order, characters escaped or not."""
    given: Given = {"id": "é", "messages": [{"role": "user", "content": "ü\u2028"}]}
    (record,) = records_of(jsonl([given]))
    line = {
        "index": 0,
        "id": "é",
        "prompt": [{"content": "ü\u2028", "role": "user"}],
        "error": None,
    }
    for is_ascii in (True, False):
        written = json.dumps(line, ensure_ascii=is_ascii).encode()
        assert PROMPTS.echo_in(written) == PROMPTS.echo_of(record)


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system kills a process that writes to a page of a mapped file which has no room."""

    def refuse(file: int, start: int, length: int) -> None:
        assert (start, length) == (0, 8 * NUM_ROWS)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CaravanError, match=r"can't write to .*echoes: No space left on device"):
        verdict_on(PROMPTS, *right(PROMPTS), tmp_path)
    assert not (tmp_path / "echoes").exists()
