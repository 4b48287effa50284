"""Which rows of a job are done, and the files that say so.

The result lines themselves are the record: a row is done when its line is there whole. So there is
nothing that could disagree with them, and what is cut off is done again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.results.done_rows import DoneRows
from llama_runtime.batch.results.in_order import InOrder, Journal
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.results.output_file import OutputFile
from llama_runtime.batch.results.reading import read_lines
from llama_runtime.errors import RequestError

SYNC_SECONDS = 5.0  # what a power cut may cost
FIRST_SYNC_SECONDS = 0.5  # then twice as long each time, so that a short run is known too
MOST_TAKEN_BACK = 2**26  # bytes of lines that wait again; a power cut leaves far fewer


class Ledger:
    """Takes the outcomes of rows, and writes them where they belong.

    Args:
        form: what the lines look like.
        output: where they go; None for standard output.
        errors: where those of rows that failed go; None for the output.
        ordered: whether lines are written in the order of the rows.
        journal: the file of those that are, or None if the job can't be resumed.

    Attributes:
        window: how many rows may be done before their turn; no further one begins then.
        done: the rows that are done.
        failed: those of them that failed.
        cut: bytes of torn lines that ``recover`` removed.
    """

    def __init__(
        self,
        form: Format,
        output: Path | None,
        errors: Path | None = None,
        *,
        ordered: bool = True,
        journal: Path | None = None,
    ) -> None:
        self._form = form
        self.output = OutputFile(output)
        self.errors = self.output if errors is None else OutputFile(errors)
        self._files = [self.output] if errors is None else [self.output, self.errors]
        self.window = 0
        self.done = DoneRows()
        self.failed = DoneRows()
        self.cut = 0
        self._journal = Journal(journal) if ordered and journal is not None else None
        self._in_order = InOrder(self._write, self._journal) if ordered else None
        self._synced, self._interval = time.monotonic(), FIRST_SYNC_SECONDS

    @property
    def num_written(self) -> int:
        """Rows whose lines are in the files."""
        return sum(file.lines for file in self._files)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [file.path for file in self._files if file.path is not None]

    def anew(self) -> Ledger:
        """The same, as if nothing had been read of the files yet."""
        errors = None if self.errors is self.output else self.errors.path
        journal = None if self._journal is None else self._journal.path
        ordered = self._in_order is not None
        return Ledger(self._form, self.output.path, errors, ordered=ordered, journal=journal)

    def has_room(self) -> bool:
        """Whether a further row may begin."""
        return self._in_order is None or self._in_order.num_waiting < self.window

    def recover(self, synced: dict[str, Any]) -> Iterator[Outcome]:
        """Read what earlier runs have done; called before anything is added.

        Args:
            synced: what ``lengths`` said when the files were last brought to the disk.

        Yields:
            The outcomes of the rows that are done.

        Raises:
            RequestError: the files were changed since.
            CaravanError: they can't be read.
        """
        for name, file in zip(("output", "errors"), self._files, strict=False):
            if file.path is not None and file.path.exists():
                yield from self._recovered(file, int(synced.get(name, 0)))
        if self._in_order is not None:
            self._in_order.next = self.done.first_missing()
            has_gap = self._in_order.next != len(self.done)
            if self._journal is not None:
                for outcome in self._journal.read(self._form):
                    if outcome.index not in self.done:
                        self._count(outcome)
                        self._in_order.put_back(outcome)
                        yield outcome
            if has_gap:
                self._take_back(self._in_order)
            self._in_order.flush()

    def add(self, outcome: Outcome) -> None:
        """Take what became of a row that isn't done.

        Raises:
            CaravanError: it can't be written.
            ValueError: the row is done already.
        """
        self._count(outcome)
        if self._in_order is None:
            self._write(outcome)
        else:
            self._in_order.add(outcome)

    def sync_if_due(self) -> bool:
        """Bring what was written to the disk, if that was long ago; whether it was."""
        if time.monotonic() - self._synced < self._interval:
            return False
        self.sync()
        self._interval = min(2 * self._interval, SYNC_SECONDS)
        return True

    def sync(self) -> None:
        """Bring what was written to the disk."""
        for file in self._all_files():
            file.sync()
        self._synced = time.monotonic()

    def lengths(self) -> dict[str, int]:
        """Bytes of the files, by name."""
        names = zip(("output", "errors"), self._files, strict=False)
        return {name: file.num_bytes for name, file in names}

    def close(self) -> None:
        """Close the files."""
        for file in self._all_files():
            file.close()

    def _count(self, outcome: Outcome) -> None:
        self.done.add(outcome.index)
        if outcome.error is not None:
            self.failed.add(outcome.index)

    def _all_files(self) -> list[OutputFile | Journal]:
        return [*self._files, *([self._journal] if self._journal else [])]

    def _write(self, outcome: Outcome) -> None:
        (self.output if outcome.error is None else self.errors).write(outcome.line)

    def _recovered(self, file: OutputFile, synced: int) -> Iterator[Outcome]:
        assert file.path is not None
        for line in read_lines(file.path, self._form):
            outcome = line.outcome
            if outcome is None:
                # A torn line is the last one; after a power cut the disk may hold others behind it.
                if line.start < synced and line.end < file.num_bytes:
                    raise self._changed(f"there is no whole result at byte {line.start:,}")
                self.cut += file.cut(line.start)
                return
            if outcome.index in self.done:
                raise self._changed(f"row {outcome.index} is there twice")
            self._count(outcome)
            file.lines += 1
            yield outcome

    def _take_back(self, in_order: InOrder) -> None:
        """Let results wait again for a row before them: a power cut took it from the other file."""
        missing = self._changed(f"row {in_order.next} is missing, and later ones are not")
        if self._journal is None or self.errors is self.output:
            raise missing
        num_bytes = 0
        for file in self._files:
            start = None
            for line in read_lines(file.path, self._form) if file.path and file.num_bytes else ():
                assert line.outcome is not None  # what is torn has been cut off
                if line.outcome.index > in_order.next:
                    start = line.start if start is None else start
                    num_bytes += line.end - line.start
                elif start is not None:
                    raise missing
                if num_bytes > MOST_TAKEN_BACK:
                    raise missing
                if start is not None:
                    self._journal.add(line.outcome.line)
                    in_order.put_back(line.outcome)
                    file.lines -= 1
            if start is not None:
                self._journal.sync()
                file.cut(start)

    def _changed(self, what: str) -> RequestError:
        return RequestError(
            f"{self.output} was changed since this job wrote it: {what}. Write elsewhere with "
            "--output, or give --force to begin anew",
            param="output",
        )
