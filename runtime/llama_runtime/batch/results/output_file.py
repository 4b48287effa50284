"""Result files: whole lines are added at the end, whatever happens."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import BinaryIO

from llama_runtime.errors import CaravanError
from llama_runtime.interrupts import Held


class OutputFile:
    """Takes lines: a file that is opened when the first one comes, or standard output.

    Args:
        path: the file, which lines are added to; None for standard output.

    Attributes:
        lines: how many have been written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines = 0
        self._file: BinaryIO | None = None

    def __str__(self) -> str:
        return "standard output" if self.path is None else str(self.path)

    @property
    def num_bytes(self) -> int:
        """Length of the file."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def write(self, line: bytes) -> None:
        """Write one line and hand it to the system.

        A line that doesn't get through whole is taken back from a file.

        Raises:
            CaravanError: the system refuses.
            BrokenPipeError: whoever read the output has gone.
        """
        with Held():
            try:
                if self._file is None:
                    self._file = self._open()
                if self.path is None:
                    _write_whole(self._file, line)
                else:
                    _write_or_take_back(self._file, line)
                self.lines += 1
            except BrokenPipeError:
                raise
            except OSError as error:
                raise self._refused(error) from error

    def cut(self, length: int) -> int:
        """Shorten the file to so many bytes; how many that removes.

        Raises:
            CaravanError: the system refuses.
        """
        assert self.path is not None
        removed = self.num_bytes - length
        try:
            os.truncate(self.path, length)
        except OSError as error:
            raise self._refused(error) from error
        return removed

    def sync(self) -> None:
        """Have the system bring to the disk what was written, so that a power cut can't undo it.

        Raises:
            CaravanError: the system refuses.
        """
        if self._file is None or self.path is None or not self.path.is_file():
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None and self.path is not None:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        return sys.stdout.buffer if self.path is None else self.path.open("ab", buffering=0)

    def _refused(self, error: OSError) -> CaravanError:
        return CaravanError(f"can't write to {self}: {error.strerror}")


def _write_whole(file: BinaryIO, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[file.write(rest) :]
    file.flush()


def _write_or_take_back(file: BinaryIO, line: bytes) -> None:
    """Write a line, or remove the part of it that a full disk had room for."""
    start = file.tell() if file.seekable() else None
    try:
        _write_whole(file, line)
    except OSError:
        if start is not None:
            with contextlib.suppress(OSError):
                file.truncate(start)
        raise
