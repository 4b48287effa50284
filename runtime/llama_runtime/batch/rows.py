"""Prompts files: what a line asks for, with its own errors kept to itself."""

from __future__ import annotations

import io
import json
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from llama_runtime.batch.lines import Line, LineReader
from llama_runtime.errors import RequestError
from llama_runtime.params import OPTIONS

MAX_NESTING = 32  # of lists and objects in messages
_KEYS = ("prompt", "messages", *OPTIONS)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of a job.

    Attributes:
        index: its place among the rows, from 0; blank lines don't count.
        prompt: a text, or a list of messages; None if the line says neither.
        options: the sampling options that this row sets for itself, by name, unchecked.
        error: why the row can't run, or None.
    """

    index: int
    prompt: str | list[Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    error: RequestError | None = None


class Rows:
    """The rows of an open prompts file, read as they are wanted.

    Args:
        lines: the file's lines.
        jsonl: whether a line is a JSON object; otherwise it is the prompt itself.
        strict: whether a line that isn't text is an error of the whole input, not of its row.
    """

    def __init__(self, lines: LineReader, *, jsonl: bool, strict: bool = False) -> None:
        self._lines = lines
        self._parse = _parse_json if jsonl else _parse_text
        self._strict = strict
        self._count = 0

    def ready(self) -> bool:
        """Whether the next row can be had without waiting; see ``LineReader.ready``."""
        return self._lines.ready()

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        line = next(self._lines)
        if self._strict and line.problem is not None:
            raise _refuse(f"the prompts can't be used: {line.problem}")
        row = self._parse(self._count, line)
        self._count += 1
        return row


@dataclass(frozen=True, slots=True)
class Source:
    """Where the prompts come from.

    Attributes:
        path: a file, or None for standard input.
    """

    path: Path | None

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
        return "standard input" if self.path is None else str(self.path)

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once, as pipes can."""
        return self.path is None or not stat.S_ISREG(self.path.stat().st_mode)

    @contextmanager
    def open(self, *, strict: bool = False) -> Iterator[Rows]:
        """Open the rows.

        A name that ends in ``.txt`` holds a prompt a line, one that ends in ``.jsonl`` JSON
        objects; anything else is told by its first character that isn't white space, ``{`` for
        JSON.

        Args:
            strict: see ``Rows``; the first line has to be text in any case.

        Raises:
            RequestError: it can't be read, is empty, or doesn't begin with text.
        """
        try:
            file = self._open_bytes()
        except OSError as error:
            raise _refuse(f"{self} can't be read: {error.strerror}") from error
        try:
            lines = LineReader(file)
            first = lines.peek()
            if first is None:
                raise _refuse(f"{self} is empty: it has no prompts")
            if first.problem is not None:
                raise _refuse(f"{self} can't be used: {first.problem}")
            yield Rows(lines, jsonl=self._is_jsonl(first), strict=strict)
        finally:
            if self.path is not None:
                file.close()

    def _open_bytes(self) -> io.BufferedIOBase:
        return sys.stdin.buffer if self.path is None else self.path.open("rb")  # type: ignore[return-value]

    def _is_jsonl(self, first: Line) -> bool:
        suffix = "" if self.path is None else self.path.suffix.lower()
        if suffix in (".txt", ".jsonl"):
            return suffix == ".jsonl"
        return first.text.lstrip().startswith("{")


def _refuse(message: str) -> RequestError:
    return RequestError(message, param="file")


def _parse_text(index: int, line: Line) -> Row:
    if line.problem is not None:
        return Row(index, None, error=RequestError(line.problem, param="prompt"))
    return Row(index, line.text)


def _parse_json(index: int, line: Line) -> Row:
    """A row from a JSON object; a key whose value is null counts as left out."""
    prompt = None
    try:
        given = {key: value for key, value in _load(line).items() if value is not None}
        prompt = _prompt(given, line)
        _check_keys(given, line)
    except RequestError as error:
        return Row(index, prompt, error=error)
    options = {key: given[key] for key in OPTIONS if key in given}
    if isinstance(bias := options.get("logit_bias"), dict):  # keys of JSON are texts
        options["logit_bias"] = {_token_id(key): value for key, value in bias.items()}
    return Row(index, prompt, options)


def _token_id(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 20 else key


def _load(line: Line) -> dict[str, Any]:
    if line.problem is not None:
        raise RequestError(line.problem, param="prompt")
    try:
        value = json.loads(
            line.text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at column {error.colno}"
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:
        problem = str(error)
    else:
        if isinstance(value, dict):
            return value
        problem = f"it must be an object, not {type(value).__name__}"
    raise RequestError(f"line {line.number} is not a JSON row: {problem}", param="prompt")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} comes twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _prompt(given: Mapping[str, Any], line: Line) -> str | list[Any]:
    """The row's text or messages, sure to fit into a result line."""
    where = f"line {line.number}"
    has_text, has_messages = "prompt" in given, "messages" in given
    if has_text == has_messages:
        problem = "has both prompt and messages" if has_text else "has no prompt"
        raise RequestError(f"{where} {problem}: give one of prompt and messages", param="prompt")
    key, kind, kind_name = ("prompt", str, "text") if has_text else ("messages", list, "a list")
    value = given[key]
    if not isinstance(value, kind):
        raise RequestError(f"{where}: {key} must be {kind_name}, not {value!r:.80}", param=key)
    if _deeper_than(MAX_NESTING, value):
        raise RequestError(f"{where}: {key} is nested over {MAX_NESTING} levels deep", param=key)
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            f"{where}: {key} holds half of a surrogate pair, which is no character", param=key
        ) from None
    return value


def _deeper_than(levels: int, value: object) -> bool:
    if not isinstance(value, (list, dict)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(levels - 1, item) for item in items)


def _check_keys(given: Mapping[str, Any], line: Line) -> None:
    for key in given:
        if key not in _KEYS:
            raise RequestError(
                f"line {line.number} has an unknown key {key!r:.80}; a row has prompt or messages, "
                f"and may have {', '.join(OPTIONS)}",
                param=key,
            )
