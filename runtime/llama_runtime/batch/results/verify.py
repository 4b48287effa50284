"""The proof that results belong to their rows: each row once, in its place, and none besides."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llama_runtime.batch.forms.formats import Format, Record
from llama_runtime.batch.results.done_rows import DoneRows
from llama_runtime.batch.results.reading import read_lines
from llama_runtime.errors import CaravanError

_SHOWN = 5  # faults that are named


@dataclass(slots=True)
class Verdict:
    """What a look at rows and results has found.

    Attributes:
        rows: rows of the input.
        failed: results that are errors.
        num_faults: what is wrong, in all.
        faults: the first of them, each a sentence.
    """

    rows: int = 0
    failed: int = 0
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, fault: str) -> None:
        """Count something that is wrong."""
        self.num_faults += 1
        if len(self.faults) < _SHOWN:
            self.faults.append(fault)


def verify(
    records: Iterable[Record],
    num_rows: int,
    form: Format,
    files: Iterable[Path],
    scratch: Path,
    *,
    ordered: bool,
) -> Verdict:
    """Compare rows and results, neither of which is held.

    Args:
        records: the rows.
        num_rows: how many there are.
        form: what rows and results look like.
        files: the result files.
        scratch: a file for 8 bytes a row, which is removed in the end.
        ordered: whether the results of each file must be in the order of the rows.

    Raises:
        CaravanError: a file can't be read or written.
    """
    verdict, seen = Verdict(), DoneRows()
    shape = (max(num_rows, 1),)
    try:
        with scratch.open("wb") as file:  # its room is there, or a full disk kills the process
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 8 * shape[0])
            else:
                file.truncate(8 * shape[0])
        echoes = np.memmap(scratch, np.uint64, "r+", shape=shape)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise CaravanError(f"can't write to {scratch}: {error.strerror}") from error
    try:
        for path in files:
            if path.exists():
                _read_results(path, form, num_rows, echoes, seen, verdict, ordered=ordered)
        for record in records:
            verdict.rows += 1
            if record.index not in seen:
                verdict.note(f"row {record.index} has no result")
            elif echoes[record.index] != _digest(form.echo_of(record)):
                verdict.note(f"the result of row {record.index} is that of another row")
        if verdict.rows != num_rows:
            verdict.note(f"there are {verdict.rows} rows, and there were {num_rows}")
    finally:
        del echoes
        scratch.unlink(missing_ok=True)
    return verdict


def _read_results(
    path: Path,
    form: Format,
    num_rows: int,
    echoes: npt.NDArray[np.uint64],
    seen: DoneRows,
    verdict: Verdict,
    *,
    ordered: bool,
) -> None:
    last = -1
    for line in read_lines(path, form):
        if line.outcome is None:
            verdict.note(f"{path} has no whole result at byte {line.start:,}")
            return
        index = line.outcome.index
        verdict.failed += line.outcome.error is not None
        if index >= num_rows:
            verdict.note(f"{path} has a result of row {index}, and there are {num_rows} rows")
        elif index in seen:
            verdict.note(f"row {index} has two results")
        else:
            seen.add(index)
            echoes[index] = _digest(form.echo_in(line.outcome.line))
            if ordered and index < last:
                verdict.note(f"{path} has row {index} behind row {last}")
        last = index


def _digest(echo: str) -> np.uint64:
    return np.frombuffer(blake2b(echo.encode(), digest_size=8).digest(), np.uint64)[0]  # type: ignore[no-any-return]
