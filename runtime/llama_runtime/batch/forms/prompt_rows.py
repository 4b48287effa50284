"""Rows of prompts: what a line asks for, with its own errors kept to itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_runtime.batch.rows.lines import Line
from llama_runtime.errors import RequestError
from llama_runtime.json_values import refuse_constant, without_repeats
from llama_runtime.params import OPTIONS

MAX_NESTING = 32  # of lists and objects in messages
MAX_ID_CHARACTERS = 512
_KEYS = ("id", "prompt", "messages", *OPTIONS)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of a job.

    Attributes:
        index: its place among the rows, from 0; blank lines don't count.
        prompt: a text, or a list of messages; None if the line says neither.
        options: the sampling options that this row sets for itself, by name, unchecked.
        id: the row's own name for itself, a text or a whole number, which its result repeats.
        error: why the row can't run, or None.
    """

    index: int
    prompt: str | list[Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    id: str | int | None = None
    error: RequestError | None = None


def parse_row(index: int, line: Line, *, is_object: bool) -> Row:
    """The row of a line; what is wrong with it stands in the row.

    Args:
        index: see ``Row``.
        line: its text.
        is_object: whether the line is a JSON object; otherwise it is the prompt itself.
    """
    return _parse_json(index, line) if is_object else _parse_text(index, line)


def _parse_text(index: int, line: Line) -> Row:
    if line.problem is not None:
        return Row(index, None, error=RequestError(line.problem, param="prompt"))
    return Row(index, line.text)


def _parse_json(index: int, line: Line) -> Row:
    """A row from a JSON object; a key whose value is null counts as left out."""
    prompt = row_id = None
    try:
        given = {key: value for key, value in load_object(line).items() if value is not None}
        row_id = _id(given, line)
        prompt = _prompt(given, line)
        _check_keys(given, line)
    except RequestError as error:
        return Row(index, prompt, id=row_id, error=error)
    options = {key: given[key] for key in OPTIONS if key in given}
    if isinstance(bias := options.get("logit_bias"), dict):  # keys of JSON are texts
        options["logit_bias"] = {_token_id(key): value for key, value in bias.items()}
    return Row(index, prompt, options, row_id)


def _token_id(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 20 else key


def load_object(line: Line) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        RequestError: it is no text, or no object, or has a key twice, or a number that JSON lacks.
    """
    if line.problem is not None:
        raise RequestError(line.problem, param="prompt")
    try:
        value = json.loads(
            line.text, object_pairs_hook=without_repeats, parse_constant=refuse_constant
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


def _id(given: Mapping[str, Any], line: Line) -> str | int | None:
    value = given.get("id")
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_ID_CHARACTERS:
        raise RequestError(
            f"line {line.number}: id must be a whole number, or a text of 1 to {MAX_ID_CHARACTERS} "
            f"characters, not {value!r:.80}",
            param="id",
        )
    _check_text(value, "id", line)
    return value


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
    _check_text(value, key, line)
    return value


def _check_text(value: object, key: str, line: Line) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            f"line {line.number}: {key} holds half of a surrogate pair, which is no character",
            param=key,
        ) from None
    except ValueError:  # 1e400, which is read as infinity
        raise RequestError(
            f"line {line.number}: {key} holds a number beyond all that JSON can write", param=key
        ) from None


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
                f"and may have id, {', '.join(OPTIONS)}",
                param=key,
            )
