"""Readers of the values in a manifest: each takes a JSON value and where it stands, and checks it.

What one returns is what it should be; anything else is a ``BundleError`` that names the place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from llama_runtime.errors import BundleError

_HEX = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")
Reader = Callable[[object, str], T]


class Object:
    """One JSON object whose keys are taken one by one until none may be left."""

    def __init__(self, value: object, where: str) -> None:
        self._left: dict[str, object] = dict(mapping_of(lambda item, _: item)(value, where))
        self._where = where

    def take(self, key: str, read: Reader[T]) -> T:
        """The value of a key, which must be there."""
        if key not in self._left:
            raise BundleError(f"{self._where} has no '{key}'")
        return read(self._left.pop(key), f"{self._where}: {key}")

    def close(self) -> None:
        """Refuse what is left, which nobody knows."""
        if self._left:
            raise BundleError(f"{self._where} has an unknown field '{min(self._left)}'")


def any_text(value: object, where: str) -> str:
    """A text of any characters."""
    if not isinstance(value, str):
        raise BundleError(f"{where} must be text, not {value!r:.80}")
    return value


def text(value: object, where: str) -> str:
    """A text that is shown: a control character in it could change a terminal."""
    found = any_text(value, where)
    if not found.isprintable():
        raise BundleError(f"{where} must be text that prints on one line, not {value!r:.80}")
    return found


def integer(low: int, high: int) -> Reader[int]:
    """A whole number in a range."""

    def read(value: object, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise BundleError(f"{where} must be a whole number in {low}..{high}, not {value!r:.80}")
        return value

    return read


def sha256(value: object, where: str) -> str:
    """A hash in hexadecimal."""
    if not _HEX.fullmatch(text(value, where)):
        raise BundleError(f"{where} must be 64 lower-case hexadecimal digits, not {value!r:.80}")
    return str(value)


def file_name(value: object, where: str) -> str:
    """A name that stays inside the bundle on every operating system."""
    name = any_text(value, where)
    outside = any(part in ("", ".", "..") or part[-1] in ". " for part in name.split("/"))
    if outside or "\\" in name or ":" in name or not name.isprintable():
        raise BundleError(f"{where}: {name!r:.80} is not the name of a file inside the bundle")
    return name


def list_of(read: Reader[T]) -> Reader[tuple[T, ...]]:
    """A list whose items are each read."""

    def read_list(value: object, where: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise BundleError(f"{where} must be a list, not {value!r:.80}")
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read_list


def mapping_of(read: Reader[T]) -> Reader[dict[str, T]]:
    """An object of any keys, whose values are each read."""

    def read_mapping(value: object, where: str) -> dict[str, T]:
        if not isinstance(value, dict):
            raise BundleError(f"{where} must be an object, not {value!r:.80}")
        return {key: read(item, f"{where}: {key:.80}") for key, item in value.items()}

    return read_mapping


def record(make: Callable[..., T], **readers: Reader[Any]) -> Reader[T]:
    """An object of exactly these keys, made into something else."""

    def read(value: object, where: str) -> T:
        given = Object(value, where)
        values = {key: given.take(key, reader) for key, reader in readers.items()}
        given.close()
        return make(**values)

    return read


def optional_text(value: object, where: str) -> str | None:
    """A text that is shown, or null."""
    return None if value is None else text(value, where)
