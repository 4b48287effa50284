"""Where the rows of a job come from: a file or a stream, of whatever form, as lines of text."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, Literal

from llama_runtime.batch.rows.lines import Line, LineReader
from llama_runtime.batch.rows.parquet import PARQUET_MAGIC, parquet_lines
from llama_runtime.errors import RequestError

Kind = Literal["text", "jsonl", "openai"]

GZIP_MAGIC = b"\x1f\x8b"
_LOOKED_AT = 16  # lines; the first of them that is an object says which kind of objects they are


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of an open source.

    Attributes:
        kind: what a line is: "text", a prompt; "jsonl", an object with prompt or messages;
            "openai", a request of OpenAI's Batch API.
        lines: one a row, read as they are wanted.
    """

    kind: Kind
    lines: Iterator[Line]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows come from.

    Attributes:
        path: a file, or None for standard input.
        name: what it is called in messages; None for the path.
    """

    path: Path | None
    name: str | None = None

    @classmethod
    def named(cls, name: str) -> Source:
        """The file of this name, or standard input for ``-``.

        Raises:
            RequestError: there is no such file, or it is a directory.
        """
        if name == "-":
            return cls(None)
        if not name:
            raise _refuse("the name of the prompts file is empty")
        path = Path(name)
        try:
            is_directory = stat.S_ISDIR(path.stat().st_mode)
        except FileNotFoundError as error:
            raise _refuse(f"the prompts file {name} does not exist") from error
        except OSError as error:
            raise _refuse(f"the prompts file {name} can't be read: {error.strerror}") from error
        if is_directory:
            raise _refuse(f"the prompts file {name} is a directory")
        return cls(path)

    def __str__(self) -> str:
        return self.name or ("standard input" if self.path is None else str(self.path))

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once, as pipes can."""
        return self.path is None or not stat.S_ISREG(self.path.stat().st_mode)

    @contextmanager
    def open(self) -> Iterator[Rows]:
        """Open the rows. What they are is told by what is there, and not by the name alone.

        A parquet or gzip file is known by its first bytes. Rows of parquet are objects. Of other
        lines, a name in ``.txt`` (before ``.gz``) says that each is a prompt, and one in ``.jsonl``
        that it is an object; anything else is told by its first character that isn't white space,
        ``{`` for objects. Objects are of OpenAI's Batch API if the first of them has
        ``custom_id``, or ``url`` and ``body``.

        Raises:
            RequestError: it can't be read, is empty, or doesn't begin with text; or it is a parquet
                file and a stream.
            DependencyError: it is a parquet file, and the package that reads them is missing.
        """
        with ExitStack() as stack:
            lines = self._lines(stack)
            first = list(islice(lines, 1))
            if not first:
                raise _refuse(f"{self} is empty: it has no prompts")
            if first[0].problem is not None:
                raise _refuse(f"{self} can't be used: {first[0].problem}")
            if isinstance(lines, LineReader) and not self._holds_objects(first[0]):
                yield Rows("text", chain(first, lines))
                return
            if not _is_object(first[0]):  # else a stream is answered without waiting for more
                first += islice(lines, _LOOKED_AT)
            yield Rows("openai" if _is_openai(first) else "jsonl", chain(first, lines))

    @contextmanager
    def stream(self) -> Iterator[BinaryIO]:
        """Open the bytes as they are.

        Raises:
            RequestError: they can't be read.
        """
        try:
            file = self._open_bytes()
        except OSError as error:
            raise _refuse(f"{self} can't be read: {error.strerror}") from error
        try:
            yield file
        finally:
            if self.path is not None:
                file.close()

    def stamp(self) -> tuple[int, int, int]:
        """What changes when somebody writes to a file, and can be had at once.

        Raises:
            RequestError: it can't be looked at.
        """
        assert self.path is not None
        try:
            found = self.path.stat()
        except OSError as error:
            raise _refuse(f"{self} can't be read: {error.strerror}") from error
        return found.st_ino, found.st_size, found.st_mtime_ns

    def fingerprint(self) -> dict[str, object]:
        """Size and SHA-256 of the bytes of a file.

        Raises:
            RequestError: it can't be read.
        """
        try:
            with self._open_bytes() as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                return {"bytes": file.tell(), "sha256": digest}
        except OSError as error:
            raise _refuse(f"{self} can't be read: {error.strerror}") from error

    def _lines(self, stack: ExitStack) -> Iterator[Line]:
        try:
            file, is_file = self._open_bytes(), not self.is_stream
            if is_file:  # to close a stream would wait for a thread that waits for its next bytes
                stack.enter_context(file)
            magic = file.peek(4)[:4]
        except OSError as error:
            raise _refuse(f"{self} can't be read: {error.strerror}") from error
        if magic == PARQUET_MAGIC:
            if self.is_stream or self.path is None:
                raise _refuse(
                    f"{self} is a parquet file, which can't be read as a stream: write it to a file"
                )
            return parquet_lines(self.path)
        if magic[:2] == GZIP_MAGIC:
            unpacked = gzip.GzipFile(fileobj=file)
            return iter(LineReader(stack.enter_context(unpacked) if is_file else unpacked))
        return iter(LineReader(file))

    def _open_bytes(self) -> io.BufferedReader:
        if self.path is not None:
            return self.path.open("rb")
        stdin = sys.stdin.buffer  # of any kind, where a program has replaced it
        if isinstance(getattr(stdin, "raw", None), io.FileIO):
            # A buffer of its own: the interpreter dies at its end if a thread still waits in that
            # of sys.stdin, as happens when whoever reads the results has gone.
            return open(stdin.fileno(), "rb", closefd=False)
        return stdin if isinstance(stdin, io.BufferedReader) else io.BufferedReader(stdin)  # type: ignore[arg-type]

    def _holds_objects(self, first: Line) -> bool:
        suffix = "" if self.path is None else bare(self.path).suffix.lower()
        if suffix in (".txt", ".jsonl"):
            return suffix == ".jsonl"
        return first.text.lstrip().startswith("{")


def bare(path: Path) -> Path:
    """The name of what a compressed file holds."""
    return path.with_suffix("") if path.suffix.lower() in (".gz", ".gzip") else path


def _is_object(line: Line) -> bool:
    return isinstance(_value(line), dict)


def _is_openai(lines: Sequence[Line]) -> bool:
    first = next((value for line in lines if isinstance(value := _value(line), dict)), {})
    return "custom_id" in first or ("url" in first and "body" in first)


def _value(line: Line) -> object:
    try:
        return json.loads(line.text)
    except (ValueError, RecursionError):
        return None


def _refuse(message: str) -> RequestError:
    return RequestError(message, param="file")
