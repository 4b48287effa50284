"""What a command says on standard error while it works."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

REDRAW_SECONDS = 0.25  # on a terminal
LINE_SECONDS = 5.0  # elsewhere: a log isn't read while it grows
_FALLBACK_WIDTH = 80


class Console:
    """Plain lines, and one line that says how far the work has come.

    On a terminal that line is redrawn in place and erased in the end; elsewhere it is a plain line
    every few seconds.

    Args:
        stream: standard error.
        quiet: whether nothing is said.
        with_status: whether there is a status line; it would tear other output on the same
            terminal.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False, with_status: bool = True) -> None:
        self._stream = stream
        self.quiet = quiet
        self._with_status = with_status and not quiet
        self.is_terminal = stream.isatty()

    def say(self, line: str) -> None:
        """Write a line."""
        if not self.quiet:
            with suppress(OSError):  # nobody reads it any more, which is no reason to end the work
                self._stream.write(line + "\n")
                self._stream.flush()

    @contextmanager
    def status(self, parts: Callable[[], Sequence[str]]) -> Iterator[None]:
        """Show how far the work has come until the block ends.

        Args:
            parts: called from another thread: what to show, the most important first. What the
                terminal has no room for is left out.
        """
        if not self._with_status:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._show, args=(parts, done), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _show(self, parts: Callable[[], Sequence[str]], done: threading.Event) -> None:
        drawn = 0
        try:
            while not done.wait(REDRAW_SECONDS if self.is_terminal else LINE_SECONDS):
                if not self.is_terminal:
                    self.say(fit(parts(), None))
                    continue
                text = fit(parts(), self._width() - 1)  # the last column would wrap
                self._stream.write("\r" + text.ljust(drawn))
                self._stream.flush()
                drawn = len(text)
            if drawn:
                self._stream.write("\r" + " " * min(drawn, self._width() - 1) + "\r")
                self._stream.flush()
        except OSError:
            return  # nobody reads it any more, which is no reason to end the work

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _FALLBACK_WIDTH
        except OSError:
            return _FALLBACK_WIDTH


def fit(parts: Sequence[str], width: int | None) -> str:
    """As many parts as fit, in their order, with commas between; always the first, cut if need be.

    Args:
        parts: texts of narrow characters.
        width: columns; None for any number.
    """
    text = parts[0]
    for part in parts[1:]:
        longer = f"{text}, {part}"
        if width is None or len(longer) <= width:
            text = longer
    return text if width is None else text[: max(0, width)]


def duration(seconds: float) -> str:
    """A time as ``m:ss`` or ``h:mm:ss``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
