"""The stages of a build as a person sees them: a bar while one runs, then its time."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import TextIO, TypeVar

BAR_CELLS = 24
REDRAW_S = 0.1

Advance = Callable[[int], None]
Item = TypeVar("Item")


class Stages:
    """Prints one line a stage; on a terminal the line is a bar until the stage is over.

    Args:
        stream: where to; None prints nothing.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._terminal = stream is not None and stream.isatty()

    @contextmanager
    def __call__(self, name: str, total: int = 0) -> Iterator[Advance]:
        """Time a stage.

        Args:
            name: what the line says.
            total: the count that means done; 0 if it can't be known.

        Yields:
            A function to call with the count so far.
        """
        start = drawn = time.monotonic()

        def advance(done: int) -> None:
            nonlocal drawn
            now = time.monotonic()
            if self._terminal and total and now - drawn >= REDRAW_S:
                drawn = now
                filled = BAR_CELLS * min(done, total) // total
                bar = "█" * filled + "░" * (BAR_CELLS - filled)
                self._write(f"\r{self._fit(f'{name:<20}{bar} {100 * done // total:3d} %')}")

        if self._terminal:
            self._write(f"{name:<20}…")
        try:
            yield advance
        except BaseException:
            self._end_line(f"{name:<20}failed")
            raise
        self._end_line(f"{name:<20}{time.monotonic() - start:6.1f} s")

    def note(self, sentence: str) -> None:
        """Print what a person should know beside the stages."""
        self._write(f"{sentence}\n")

    def _end_line(self, line: str) -> None:
        self._write(f"\r\x1b[K{line}\n" if self._terminal else f"{line}\n")

    def _fit(self, line: str) -> str:
        return line[: shutil.get_terminal_size().columns - 1] + "\x1b[K"

    def _write(self, text: str) -> None:
        if self._stream is not None:
            with suppress(OSError):  # nobody reads it any more, which is no reason to end the work
                self._stream.write(text)
                self._stream.flush()


def stderr_stages() -> Stages:
    """Stages on standard error."""
    return Stages(sys.stderr)


def counted(items: Iterable[Item], progress: Advance) -> Iterator[Item]:
    """Give items on, one in memory at a time, and tell how many there were so far.

    Args:
        items: each made when it is asked for.
        progress: called with the count of items, that which is given next among them.
    """
    numbers = count(1)  # for ``enumerate`` keeps an item until it has the next
    for item in items:
        progress(next(numbers))
        yield item
        del item  # the caller's alone while the next is made
