"""What Ctrl-C and a polite request to end do to a command.

An exception that may come at any line finds its way out badly: imports swallow it, finalizers print
it, and half-done bookkeeping raises errors of its own. So a command doesn't unwind. It says one
line, does what has to be done for nothing to be lost, and ends, with the status that a shell gives
to a program that a signal has ended.

Only commands use this: a library leaves signals to its program. It is the first thing that they
import, and imports little: until it is there, Python answers an interrupt with a traceback.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

    LastAct = Callable[[], str]
    Handler = Callable[[int, FrameType | None], object]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_last_act: LastAct = lambda: "interrupted"  # noqa: E731 - a default, replaced as work goes on


def end_at_once() -> None:
    """From now on, end the process when it is interrupted. For the main thread.

    A signal that this process was told to ignore, as ``nohup`` does, stays ignored.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def leave_in_peace() -> None:
    """The work is done: nothing keeps the interpreter from ending as it wants to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class last_act:  # noqa: N801 - used as a function is, in a with
    """Within the block, do something before the process is ended.

    Args:
        act: called between any two lines of the main thread; what it returns is said, if anything.
    """

    def __init__(self, act: LastAct) -> None:
        self._act = act

    def __enter__(self) -> None:
        global _last_act
        self._before, _last_act = _last_act, self._act

    def __exit__(self, *_: object) -> None:
        global _last_act
        _last_act = self._before


class Held:
    """Keeps interrupts from tearing what is done in the block: one that comes is taken at its end.

    A second one isn't held, in case the block never ends. In other threads than the main one, which
    no interrupt reaches, it does nothing.
    """

    def __enter__(self) -> None:
        self._came: int | None = None
        self._before: dict[int, Handler] = {}
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    signal.signal(number, self._take)
                    self._before[number] = handler
        except ValueError:  # not the main thread
            self._before.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._came is not None and kind is None:
            self._before[self._came](self._came, None)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None:
            self._before[number](number, frame)
        self._came = number


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    line = "interrupted"
    try:
        line = _last_act()
    finally:
        if line:
            start = "\n" if _is_terminal() else ""
            try:  # noqa: SIM105 - contextlib is one more import
                os.write(2, f"{start}{line}\n".encode())
            except OSError:
                pass
        os._exit(128 + number)


def _is_terminal() -> bool:
    try:
        return os.isatty(2)
    except OSError:
        return False
