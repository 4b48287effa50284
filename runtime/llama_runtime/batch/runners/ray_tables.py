"""Rows and outcomes as tables: what goes to the workers of a Ray cluster, and what comes back."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.results.done_rows import DoneRows
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.rows.lines import Line
from llama_runtime.errors import BackendError, CaravanError, one_line

if TYPE_CHECKING:
    import pyarrow

FILE_ROWS = 4096
FILE_BYTES = 2**25  # of text; what workers answer for a file is far below what Ray would split
_SHARE = 4

FAILURE = -1  # in the place of an index: the worker itself has failed, with this error


def rows_of_piece(left: int, num_workers: int, slots: int) -> int:
    """How many rows the next piece has: fewer as the end comes nearer, so that all end together.

    Args:
        left: rows that are in no piece yet.
        num_workers: who share them.
        slots: sequences that a worker runs at once. A piece has as many rows at least, and eight
            times as many at most: a worker answers for a piece when all of it is done.
    """
    return min(max(left // (_SHARE * num_workers), slots), 8 * slots)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows that are handed out together.

    Attributes:
        path: of the file.
        first: the row group that they begin with.
        count: of row groups.
    """

    path: str
    first: int
    count: int

    def read(self) -> list[Record]:
        """The rows.

        Raises:
            CaravanError: they can't be read here.
        """
        import pyarrow
        import pyarrow.parquet

        groups = list(range(self.first, self.first + self.count))
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                rows = file.read_row_groups(groups).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise CaravanError(
                f"the rows in {self.path} can't be read there ({one_line(error, 100)}): the "
                "results, beside which they lie, must be on storage that all nodes see at the same "
                "path"
            ) from error
        return [
            Record(row["index"], Line(row["number"], row["text"], row["problem"])) for row in rows
        ]

    def note_try(self) -> int:
        """Count that it is run; how often it was before.

        Raises:
            CaravanError: it can't be counted.
        """
        path = f"{self.path}.{self.first}.tries"
        try:
            with open(path, "ab") as file:
                before = file.tell()
                file.write(b".")
        except OSError as error:
            raise CaravanError(f"can't write to {path} there: {error.strerror}") from error
        return before


class Shards:
    """Parquet files that hold the rows which aren't done.

    Args:
        folder: where they lie; it is made, and what is in it removed.
        slots: rows of a row group, of which pieces are made.

    Attributes:
        indices: of the rows in them.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self._folder = folder.absolute()
        self._slots = slots
        self._files: list[tuple[str, int]] = []
        self.indices = DoneRows()

    def write(self, records: Iterable[Record]) -> None:
        """Write the rows.

        Raises:
            CaravanError: they can't be written, or not read.
        """
        try:
            self.remove()
            self._folder.mkdir(parents=True)
            for rows in _groups(records):
                self._write(rows)
        except OSError as error:
            raise CaravanError(f"can't write to {self._folder}: {error.strerror}") from error

    def pieces(self, num_workers: int) -> Iterator[Piece]:
        """All rows in pieces, in their order.

        Args:
            num_workers: who share them.
        """
        left = len(self.indices)
        for path, num_rows in self._files:
            first, last = 0, -(-num_rows // self._slots)
            while first < last:
                size = rows_of_piece(left, num_workers, self._slots)
                count = min(size // self._slots, last - first)
                yield Piece(path, first, count)
                first += count
                left -= min(count * self._slots, num_rows - (first - count) * self._slots)

    def remove(self) -> None:
        """Remove the files, if they are there."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, rows: list[Record]) -> None:
        import pyarrow
        import pyarrow.parquet

        path = str(self._folder / f"{len(self._files):08}.parquet")
        columns = {
            "index": pyarrow.array([row.index for row in rows], pyarrow.int64()),
            "number": pyarrow.array([row.line.number for row in rows], pyarrow.int64()),
            "text": pyarrow.array([row.line.text for row in rows], pyarrow.large_string()),
            "problem": pyarrow.array([row.line.problem for row in rows], pyarrow.string()),
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=self._slots)
        self._files.append((path, len(rows)))
        for row in rows:
            self.indices.add(row.index)


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """The rows of each file."""
    rows: list[Record] = []
    num_bytes = 0
    for record in records:
        rows.append(record)
        num_bytes += len(record.line.text)
        if len(rows) >= FILE_ROWS or num_bytes >= FILE_BYTES:
            yield rows
            rows, num_bytes = [], 0
    if rows:
        yield rows


def outcome_table(outcomes: Iterable[Outcome]) -> pyarrow.Table:
    """Outcomes as a table with a row each."""
    import pyarrow

    rows = list(outcomes)
    return pyarrow.table(
        {
            "index": pyarrow.array([row.index for row in rows], pyarrow.int64()),
            "line": pyarrow.array([row.line for row in rows], pyarrow.large_binary()),
            "error": pyarrow.array([row.error for row in rows], pyarrow.string()),
            "prompt_tokens": pyarrow.array([row.prompt_tokens for row in rows], pyarrow.int64()),
            "completion_tokens": pyarrow.array(
                [row.completion_tokens for row in rows], pyarrow.int64()
            ),
            "finish_reasons": pyarrow.array(
                [list(row.finish_reasons) for row in rows], pyarrow.list_(pyarrow.string())
            ),
            "seconds": pyarrow.array([row.seconds for row in rows], pyarrow.float64()),
        }
    )


def failure_table(sentence: str) -> pyarrow.Table:
    """What a worker answers that can't run rows."""
    return outcome_table([Outcome(FAILURE, b"", sentence, 0, 0, (), None)])


def outcomes_of(table: pyarrow.Table) -> Iterator[Outcome]:
    """What ``outcome_table`` was made of.

    Raises:
        BackendError: it is of ``failure_table``.
    """
    for row in table.to_pylist():
        if row["index"] == FAILURE:
            raise BackendError(row["error"])
        yield Outcome(**{**row, "finish_reasons": tuple(row["finish_reasons"])})
