"""Typed look-ups in configurations that somebody else wrote."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from typing import TypeGuard

from llama_decoder.errors import CheckpointError

EXACT_FLOAT = 2**53  # every whole number up to here is a float too

_short = reprlib.Repr()
_short.maxlevel = 2
_short.maxstring = 80


def quoted(value: object) -> str:
    """``value`` as it may stand in a message: on one line and short, whoever wrote it."""
    return _short.repr(value)


class Fields:
    """A JSON object or GGUF metadata, read by key and type.

    A key whose value is None counts as absent, as it does for transformers.

    Args:
        values: what was parsed.
        source: what messages call it, for example ``config.json``.
    """

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values = values
        self.source = source

    def __iter__(self) -> Iterator[str]:
        return (key for key, value in self._values.items() if value is not None)

    def get(self, key: str) -> object:
        """The value as it stands, or None."""
        return self._values.get(key)

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default the key must be there."""
        value = self.maybe_whole(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.source} has no {key}, which a Llama needs")
        return value

    def maybe_whole(self, key: str) -> int | None:
        """A whole number, or None where the key is absent."""
        value = self._values.get(key)
        if value is None or _is_whole(value):
            return value
        raise self._wrong(key, "a whole number")

    def maybe_real(self, key: str) -> float | None:
        """A number as a float, or None where the key is absent."""
        value = self._values.get(key)
        if value is None or isinstance(value, float):
            return value
        if _is_whole(value) and abs(value) <= EXACT_FLOAT:
            return float(value)
        raise self._wrong(key, "a number")

    def maybe_text(self, key: str) -> str | None:
        """A string, or None where the key is absent."""
        value = self._values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, "a string")

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        raise self._wrong(key, "true or false")

    def section(self, key: str) -> Fields:
        """A nested object; empty where the key is absent."""
        value = self._values.get(key)
        if value is None:
            value = {}
        if isinstance(value, Mapping):
            return Fields(value, f"{key} in {self.source}")
        raise self._wrong(key, "an object")

    def _wrong(self, key: str, wanted: str) -> CheckpointError:
        value = quoted(self._values.get(key))
        return CheckpointError(f"{key} in {self.source} is {value}; it must be {wanted}")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
