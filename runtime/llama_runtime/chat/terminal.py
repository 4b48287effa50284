"""What a chat does to the terminal and to Ctrl-C, and undoes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llama_runtime.interrupts import last_act

_RESET = b"\x1b[?2004l\x1b[?25h"  # no marks around what is pasted, and a cursor


@contextmanager
def on_ctrl_c(act: Callable[[], object]) -> Iterator[None]:
    """Within the block Ctrl-C doesn't end the process, but does this.

    Args:
        act: called between any two lines of the main thread. What it raises is raised there.
    """

    def take(_number: int, _frame: FrameType | None) -> None:
        act()

    before = signal.signal(signal.SIGINT, take)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def restored() -> Iterator[None]:
    """Leave the terminal of standard input as it was, also where a signal ends the process."""
    if sys.platform != "win32":
        import termios

        before = termios.tcgetattr(sys.stdin.fileno())

        def restore() -> str:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)
            if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
                os.write(sys.stdout.fileno(), _RESET)
            return "interrupted"

        with last_act(restore):
            yield
    else:  # whose consoles have no such state
        yield


@contextmanager
def without_echo() -> Iterator[None]:
    """What is typed within the block doesn't tear the text that comes; the next prompt gets it."""
    if sys.platform != "win32" and sys.stdin.isatty():
        import termios

        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
        silent = [*before]
        silent[3] &= ~termios.ECHO
        termios.tcsetattr(number, termios.TCSANOW, silent)
        try:
            yield
        finally:
            termios.tcsetattr(number, termios.TCSANOW, before)
    else:
        yield
