"""Result files, read back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.errors import CaravanError


@dataclass(frozen=True, slots=True)
class ReadLine:
    """A line of a result file.

    Attributes:
        start: the byte at which it begins.
        end: the byte behind it.
        outcome: what it says; None if it isn't whole.
    """

    start: int
    end: int
    outcome: Outcome | None


def read_lines(path: Path, form: Format) -> Iterator[ReadLine]:
    """The lines of a result file.

    Args:
        path: the file.
        form: what they look like.

    Yields:
        Each; the first that isn't whole is the last.

    Raises:
        CaravanError: the file can't be read.
    """
    start = 0
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    outcome = form.read(line)
                except ValueError:
                    yield ReadLine(start, start + len(line), None)
                    return
                yield ReadLine(start, start + len(line), outcome)
                start += len(line)
    except OSError as error:
        raise CaravanError(f"{path} can't be read: {error.strerror}") from error
