"""Results that are there before their turn: kept on the disk too, so that no row is done twice."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.results.output_file import OutputFile
from llama_runtime.batch.results.reading import read_lines
from llama_runtime.errors import CaravanError

_SMALL = 2**20  # bytes; a shorter journal isn't worth emptying
_LARGE = 2**26  # bytes; a longer one is written anew with what still waits


class InOrder:
    """Passes outcomes on in the order of their index, each as soon as those before it are there.

    Args:
        write: takes each.
        journal: where those that wait are kept; None where a job can't be resumed.

    Attributes:
        next: the index that is passed on next.
    """

    def __init__(self, write: Callable[[Outcome], None], journal: Journal | None = None) -> None:
        self.next = 0
        self._write = write
        self._journal = journal
        self._waiting: dict[int, Outcome] = {}

    @property
    def num_waiting(self) -> int:
        """Outcomes that wait for an earlier one."""
        return len(self._waiting)

    def put_back(self, outcome: Outcome) -> None:
        """Take one that is in the journal already."""
        self._waiting[outcome.index] = outcome

    def add(self, outcome: Outcome) -> None:
        """Take the outcome of a row, the only one with this index."""
        self._waiting[outcome.index] = outcome
        if self._journal is not None and outcome.index != self.next:
            self._journal.add(outcome.line)
        self.flush()

    def flush(self) -> None:
        """Pass on what can be."""
        while self.next in self._waiting:
            self._write(self._waiting[self.next])
            del self._waiting[self.next]
            self.next += 1
        if self._journal is not None:
            self._journal.shorten(self._waiting.values())


class Journal:
    """Lines that wait for their turn, in a file; those that have had it stay there for a while.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = OutputFile(path)
        self._num_bytes = self._file.num_bytes
        self._limit = _LARGE

    def read(self, form: Format) -> Iterator[Outcome]:
        """What the file holds, up to a line that isn't whole, which is removed."""
        if self.path.exists():
            for line in read_lines(self.path, form):
                if line.outcome is None:
                    self._num_bytes -= self._file.cut(line.start)
                    return
                yield line.outcome

    def add(self, line: bytes) -> None:
        """Add a line.

        Raises:
            CaravanError: it can't be written.
        """
        self._file.write(line)
        self._num_bytes += len(line)

    def shorten(self, waiting: Collection[Outcome]) -> None:
        """Drop what waits no longer, if that is much.

        Args:
            waiting: what still waits.

        Raises:
            CaravanError: the rest can't be written.
        """
        if self._num_bytes < (self._limit if waiting else _SMALL):
            return
        self._file.close()
        rest = self.path.with_suffix(".new")
        try:
            rest.write_bytes(b"".join(outcome.line for outcome in waiting))
            os.replace(rest, self.path)
        except OSError as error:
            raise CaravanError(f"can't write to {rest}: {error.strerror}") from error
        self._num_bytes = self._file.num_bytes
        self._limit = _LARGE + self._num_bytes  # where much waits it isn't written again at once

    def sync(self) -> None:
        """See ``OutputFile.sync``."""
        self._file.sync()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
