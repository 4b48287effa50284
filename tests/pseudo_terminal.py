"""A program on a terminal that isn't there: what is typed into it, and what its screen shows."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping
from types import TracebackType

import pyte

PATIENCE = 60.0  # seconds


class PseudoTerminal:
    """A program, started on a terminal of its own; leaving the ``with`` ends it.

    Args:
        command: its command line.
        env: its environment.
        columns: of the screen.
        lines: of the screen.

    Attributes:
        raw: all that the program wrote.
    """

    def __init__(
        self, command: list[str], env: Mapping[str, str], *, columns: int = 80, lines: int = 24
    ) -> None:
        self.raw = b""
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=lambda: _take_terminal(slave),
        )
        os.close(slave)

    def press(self, text: str) -> None:
        """Send keys."""
        os.write(self._master, text.encode())

    def shows(self) -> str:
        """The screen as it is, without what is blank at its edges."""
        return "\n".join(line.rstrip() for line in self._screen.display).strip("\n")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Read what the program writes until something holds."""
        end = time.monotonic() + PATIENCE
        while not condition():
            left = end - time.monotonic()
            assert left > 0, f"{what} did not come:\n{self.shows()}"
            assert self._read(min(left, 0.1)), f"it ended before {what} came:\n{self.shows()}"

    def wait_for(self, text: str) -> None:
        """Wait until the screen holds a text."""
        self.wait(lambda: text in self.shows(), repr(text))

    def status(self) -> int:
        """The exit status, once the program has ended by itself."""
        end = time.monotonic() + PATIENCE
        while self._read(0.1):
            assert time.monotonic() < end, f"it doesn't end:\n{self.shows()}"
        return self.process.wait(PATIENCE)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size."""
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, size)
        self._screen.resize(lines, columns)

    def echoes(self) -> bool:
        """Whether the terminal is in the state in which a shell hands it over."""
        flags = termios.tcgetattr(self._master)[3]
        return bool(flags & termios.ECHO and flags & termios.ICANON and flags & termios.ISIG)

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        """Take what the program has written; False if it has closed the terminal."""
        if not select.select([self._master], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._master, 65536)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)


def _take_terminal(slave: int) -> None:
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
