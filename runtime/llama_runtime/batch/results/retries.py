"""Rows that failed and were run again: their new results take the place of the old ones."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.results.reading import read_lines
from llama_runtime.errors import CaravanError

_Place = tuple[int, int, int]  # a row, and where its new line begins and ends


def merge_retries(folder: JobFolder, form: Format, *, ordered: bool) -> None:
    """Write the result files anew, with the results of rows that were run again.

    It may be interrupted anywhere: the new results stay until both files have them, and a file that
    has them already comes out the same.

    Args:
        folder: the job's; its ``retries`` are removed in the end.
        form: what results look like.
        ordered: whether they are in the order of the rows.

    Raises:
        CaravanError: a file can't be read or written.
    """
    done: list[_Place] = []
    failed: list[_Place] = []
    for line in read_lines(folder.retries, form):
        if line.outcome is not None:
            place = (line.outcome.index, line.start, line.end)
            (failed if line.outcome.error is not None else done).append(place)
    again = {index for index, _, _ in chain(done, failed)}
    if form.errors_apart:
        _merge(folder, folder.output, form, again, done, ordered=ordered)
        _merge(folder, folder.errors, form, again, failed, ordered=ordered)
    else:
        _merge(folder, folder.output, form, again, done + failed, ordered=ordered)
    folder.retries.unlink()


def _merge(
    folder: JobFolder,
    path: Path,
    form: Format,
    again: set[int],
    places: list[_Place],
    *,
    ordered: bool,
) -> None:
    """Replace the lines of rows that were run again by those at the given places."""
    kept = (outcome for outcome in _outcomes(path, form) if outcome.index not in again)
    places.sort()
    scratch = folder.path / f"{path.name}.new"
    try:
        with folder.retries.open("rb") as retries, scratch.open("wb") as file:

            def new() -> Iterator[tuple[int, bytes]]:
                for index, start, end in places:
                    retries.seek(start)
                    yield index, retries.read(end - start)

            old: Iterable[tuple[int, bytes]] = ((each.index, each.line) for each in kept)
            lines = heapq.merge(old, new()) if ordered else chain(old, new())
            file.writelines(line for _, line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path.resolve())  # what it points to, if it is a link
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise CaravanError(f"can't write to {scratch}: {error.strerror}") from error


def _outcomes(path: Path, form: Format) -> Iterator[Outcome]:
    if path.exists():
        for line in read_lines(path, form):
            if line.outcome is not None:
                yield line.outcome
            elif line.end < path.stat().st_size:
                raise CaravanError(f"{path} has no whole result at byte {line.start:,}")
