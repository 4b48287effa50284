"""The lines of a prompts file or of a stream, one at a time and never held whole."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from llama_runtime.errors import RequestError

MAX_LINE_BYTES = 2**24  # far beyond any context; a stream without line ends must not fill memory
_READ_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Line:
    """One line that isn't blank.

    Attributes:
        number: its place in the input, from 1; blank lines count.
        text: without its line end; empty if there is a problem.
        problem: why the line can't be read, as a sentence, or None.
    """

    number: int
    text: str
    problem: str | None = None


class LineReader:
    r"""Reads lines as they are wanted, and skips blank ones.

    A line ends at ``\n`` or ``\r\n``. A byte order mark before the first one is dropped.

    Args:
        file: open for reading bytes.

    Raises:
        RequestError: by whatever reads from it, if the system refuses.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._buffer = bytearray()
        self._number = 0
        self._ended = False

    def __iter__(self) -> Iterator[Line]:
        return self

    def __next__(self) -> Line:
        while (data := self._take()) is not None:
            self._number += 1
            line = _decode(self._number, data)
            if line.problem is not None or line.text.strip():
                return line
        raise StopIteration

    def _take(self) -> bytes | None:
        """The bytes of the next line, cut just past ``MAX_LINE_BYTES``; None at the end."""
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0 and not self._ended:
            searched = len(self._buffer)
            if searched > MAX_LINE_BYTES:
                return self._cut()
            self._fill()
        data = bytes(self._buffer if end < 0 else self._buffer[: end + 1])
        del self._buffer[: len(data)]
        return data or None

    def _cut(self) -> bytes:
        data = bytes(self._buffer[: MAX_LINE_BYTES + 1])
        while (end := self._buffer.find(b"\n")) < 0 and not self._ended:
            self._buffer.clear()
            self._fill()
        del self._buffer[: end + 1 if end >= 0 else len(self._buffer)]
        return data

    def _fill(self) -> None:
        try:
            data = self._file.read1(_READ_BYTES)
        except (OSError, EOFError, zlib.error) as error:  # the last two from a damaged gzip file
            reason = getattr(error, "strerror", None) or error
            message = f"the prompts can't be read beyond line {self._number}: {reason}"
            raise RequestError(message, param="file") from error
        self._ended = not data
        self._buffer += data


def _decode(number: int, data: bytes) -> Line:
    if len(data) > MAX_LINE_BYTES:
        return Line(number, "", f"line {number} is longer than {MAX_LINE_BYTES} bytes")
    data = data.removesuffix(b"\n").removesuffix(b"\r")
    if number == 1:
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte 0x{data[error.start]:02X} at position {error.start + 1}"
        return Line(number, "", f"line {number} is not UTF-8 text: {problem}")
    if "\0" in text:
        return Line(number, "", f"line {number} is not text: it holds a zero byte")
    return Line(number, text)
