"""JSON that comes from elsewhere, looked at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import NoReturn

from llama_runtime.errors import RequestError, one_line


def json_text(value: object, param: str) -> str:
    """A caller's value as JSON text; any mapping in it is an object.

    Raises:
        RequestError: it holds what JSON can't, or half of a surrogate pair.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=as_dict)
    except (TypeError, ValueError, RecursionError) as error:
        message = f"{param} must hold JSON values only: {one_line(error)}"
        raise RequestError(message, param=param) from error
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds a lone surrogate, U+{ord(text[error.start]):04X}: "
            "it can't be written as UTF-8, so remove it",
            param=param,
        ) from error
    return text


def as_dict(value: object) -> dict[str, object]:
    """A mapping of another kind, as ``json`` takes it for an object.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def is_deeper(value: object, levels: int) -> bool:
    """Whether lists and objects lie inside each other on more than so many levels."""
    if not isinstance(value, (list, dict)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(item, levels - 1) for item in items)


def without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of ``json``'s pairs: of a key that comes twice, two readers may take other values.

    Raises:
        ValueError: one does.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} comes twice")
    return value


def refuse_constant(name: str) -> NoReturn:
    """What ``json`` is to make of NaN and Infinity, which it would take.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is not a JSON number")
