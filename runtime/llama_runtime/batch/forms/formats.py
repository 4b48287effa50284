"""What the forms of rows have in common: each makes requests of a row, and a line of its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.rows.lines import Line
from llama_runtime.completion import Completion, Request
from llama_runtime.errors import CaravanError


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it was read.

    Attributes:
        index: its place among the rows, from 0; blank lines don't count. It is the row's identity.
        line: its text.
    """

    index: int
    line: Line


class Task(Protocol):
    """A row that can run."""

    @property
    def requests(self) -> Seq[Request]:
        """What is asked of the model, one request at least."""

    def answer(self, completions: Seq[Seq[Completion]]) -> bytes:
        """The result line of a row that went well.

        Args:
            completions: of each request, in their order, by sample.
        """

    def explained(self, error: CaravanError, number: int) -> CaravanError:
        """An error of running one of the requests, said of the row.

        Args:
            error: as the completion has it.
            number: of the request, from 0.
        """


class Format(Protocol):
    """How lines become requests, and completions lines.

    Attributes:
        errors_apart: whether lines of rows that failed go to a file of their own.
    """

    errors_apart: bool

    def id_of(self, record: Record) -> str | None:
        """The name that the row gives itself, which no other may have; None if it has none."""

    def echo_of(self, record: Record) -> str:
        """What a result line must repeat of the row: its id, or what it asked."""

    def task(self, record: Record) -> Task:
        """What to run.

        Raises:
            RequestError: the row can't run.
        """

    def failure(
        self, record: Record, error: CaravanError, completions: Seq[Seq[Completion]]
    ) -> bytes:
        """The result line of a row that failed.

        Args:
            record: the row.
            error: why.
            completions: what came of each of its requests; none if it never ran.
        """

    def read(self, line: bytes) -> Outcome:
        """What a result line says; how long the row took it doesn't.

        Raises:
            ValueError: it is none, or not whole.
        """

    def echo_in(self, line: bytes) -> str:
        """See ``echo_of``.

        Args:
            line: one that ``read`` can read.
        """


def whole_object(line: bytes) -> dict[str, Any]:
    """The object of a line that was written whole.

    Raises:
        ValueError: it is something else.
    """
    if not line.endswith(b"}\n"):
        raise ValueError("it has no end")
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is no object")  # noqa: TRY004 - of what the line says
    return value
