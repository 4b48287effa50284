"""The first look at all rows: how many there are, how long, and whether two have one name."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from llama_runtime.batch.forms.formats import Format, Record
from llama_runtime.errors import CaravanError, RequestError

_ROWS_AT_ONCE = 20_000  # of the index; sorted, they go into neighbouring pages
_SHOWN = 3  # repeated names in a message


class Scan:
    """What there is to do.

    Attributes:
        rows: how many rows there are.
        longest: prompt and completion tokens of the longest one that the model can take, at least
            2, as for any model; None if nobody asked.
    """

    def __init__(self, rows: int = 0, longest: int | None = None) -> None:
        self.rows = rows
        self.longest = longest

    def read(self, records: Iterable[Record], form: Format, index: Path, *, measure: bool) -> None:
        """Look at all rows, none of which is kept.

        Args:
            records: all of them.
            form: how they are read.
            index: where the names are collected, in a file that is removed in the end.
            measure: whether to find the longest.

        Raises:
            RequestError: two rows have one name.
            CaravanError: the index can't be written.
        """
        if measure:
            self.longest = 2
        index.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(index, isolation_level=None)) as database:
                names = _Names(database)
                for record in records:
                    self.rows += 1
                    name = form.id_of(record)
                    if name is not None:
                        names.add(name, record.index)
                    if self.longest is not None:
                        self.longest = max(self.longest, _length(form, record))
                names.check()
        except sqlite3.Error as error:
            raise CaravanError(f"can't write to {index}: {error}") from error
        finally:
            index.unlink(missing_ok=True)

    def to_dict(self) -> dict[str, Any]:
        """See the attributes."""
        return {"rows": self.rows, "longest": self.longest}


class _Names:
    """The names of rows, on disk."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._new: list[tuple[str, int]] = []
        self._repeated: list[str] = []
        self._num_repeated = 0
        for pragma in ("journal_mode = OFF", "synchronous = OFF"):  # it is made anew if need be
            database.execute(f"PRAGMA {pragma}")
        database.execute("CREATE TABLE names (name TEXT PRIMARY KEY, row INTEGER) WITHOUT ROWID")

    def add(self, name: str, index: int) -> None:
        self._new.append((name, index))
        if len(self._new) >= _ROWS_AT_ONCE:
            self._store()

    def check(self) -> None:
        """Raise if a name came twice."""
        self._store()
        if self._num_repeated:
            more = self._num_repeated - len(self._repeated)
            rows = "1 row has" if self._num_repeated == 1 else f"{self._num_repeated:,} rows have"
            raise RequestError(
                f"{rows} the id of another one: "
                f"{'; '.join(self._repeated)}{f'; and {more:,} more' if more else ''}. "
                "Give each row an id of its own",
                param="file",
            )

    def _store(self) -> None:
        self._new.sort()
        before = self._database.total_changes
        self._database.execute("BEGIN")
        self._database.executemany("INSERT OR IGNORE INTO names VALUES (?, ?)", self._new)
        self._database.execute("COMMIT")
        if self._database.total_changes - before < len(self._new):
            for name, index in self._new:
                self._note(name, index)
        self._new.clear()

    def _note(self, name: str, index: int) -> None:
        query = "SELECT row FROM names WHERE name = ?"
        (first,) = self._database.execute(query, (name,)).fetchone()
        if first != index:
            self._num_repeated += 1
            if len(self._repeated) < _SHOWN:
                self._repeated.append(f"{name:.80} of rows {first} and {index}")


def _length(form: Format, record: Record) -> int:
    try:
        requests = form.task(record).requests
    except RequestError:
        return 0
    return max(len(request.prompt) + request.params.max_tokens for request in requests)
