"""The fields of a body, taken one by one, so that what nobody took is noticed.

Errors name a field by its path in the body: ``stop``, ``response_format.json_schema.schema``,
``messages[1].content``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from llama_runtime.errors import RequestError, one_line
from llama_runtime.json_values import is_deeper

MAX_NESTING = 120  # of lists and objects in a body; messages may have 100
_SHOWN_CHARACTERS = 80  # of a field's name in an error
_NAME = re.compile(rf"[\w-]{{1,{_SHOWN_CHARACTERS}}}")
_PLACE = re.compile(
    r"(?P<place>(?:messages|tools)\[\d+\](?:\.\w+|\[\d+\])*)"
    r"(?:, part (?P<part>\d+)| needs a text as '(?P<key>\w+)'| has the (?P<role>role))?"
)


class Fields:
    """The fields of one object. A value of null counts as left out.

    Args:
        value: the object.
        path: where it is in the body; empty for the body itself.

    Raises:
        RequestError: it is no object, or nested too deeply.
    """

    def __init__(self, value: object, path: str = "") -> None:
        self._path = path
        if not isinstance(value, Mapping):
            raise RequestError(
                f"{path or 'the body'} must be a JSON object, not {type(value).__name__}",
                param=path or "body",
            )
        if not path and is_deeper(value, MAX_NESTING):
            raise RequestError(
                f"the body is nested over {MAX_NESTING} levels deep: flatten it", param="body"
            )
        self._left = dict(value)

    def path(self, key: str) -> str:
        """The path of a field of this object."""
        return f"{self._path}.{key}" if self._path else key

    def wrong(self, key: str, problem: str) -> RequestError:
        """The error of a field, as a sentence that begins with its path."""
        path = self.path(key)
        return RequestError(f"{path} {problem}", param=path)

    def take(self, key: str) -> Any:
        """The value of a field, None if it is left out."""
        return self._left.pop(key, None)

    def need(self, key: str) -> Any:
        """The value of a field that must be there.

        Raises:
            RequestError: it isn't.
        """
        value = self.take(key)
        if value is None:
            raise self.wrong(key, "is missing")
        return value

    def flag(self, key: str) -> bool | None:
        """The value of a field that is true or false.

        Raises:
            RequestError: it is something else.
        """
        value = self.take(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, f"must be true or false, not {value!r:.80}")
        return value

    def text(self, key: str) -> str | None:
        """The value of a field that is text.

        Raises:
            RequestError: it is something else, or holds half of a surrogate pair.
        """
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(key, f"must be a text, not {value!r:.80}")
        if not _is_writable(value):
            raise self.wrong(key, "holds half of a surrogate pair, which is no character")
        return value

    def nested(self, key: str) -> Fields | None:
        """The fields of a field that is an object.

        Raises:
            RequestError: it is something else.
        """
        value = self.take(key)
        return None if value is None else Fields(value, self.path(key))

    def only(self, key: str, allowed: object, reason: str) -> None:
        """Take a field of which one value can be honoured.

        Args:
            key: the field.
            allowed: that value; null is taken too.
            reason: why no other one can, and what to do.

        Raises:
            RequestError: it has another value.
        """
        value = self.take(key)
        if value is not None and (type(value) is not type(allowed) or value != allowed):
            raise self.wrong(key, f"can't be {one_line(repr(value), 80)}: {reason}")

    def refuse(self, unsupported: Collection[str], advice: Mapping[str, str]) -> None:
        """Refuse what is left.

        Args:
            unsupported: fields that are known, and that nothing here can honour; null is taken.
            advice: what to do about some fields, by name.

        Raises:
            RequestError: a field is left.
        """
        for key, value in self._left.items():
            if value is None and key in unsupported:
                continue
            shown = key if _NAME.fullmatch(key) else one_line(ascii(key), _SHOWN_CHARACTERS)
            path = self.path(shown)
            problem = "is not supported" if key in unsupported or key in advice else "is unknown"
            raise RequestError(f"{path} {problem}: {advice.get(key, 'leave it out')}", param=path)


def named(error: RequestError, paths: Mapping[str, str]) -> RequestError:
    """An error of a module that doesn't know the body, said of the field that it came in.

    Args:
        error: its ``param`` is an option of ``SamplingParams``, "prompt", "messages" or "tools".
            Of the last two its sentence says the place.
        paths: the path of the field by that name, where it is another one.

    Returns:
        An error of the same kind, the same one if it needs no change.
    """
    message, param = str(error), error.param
    path = paths.get(param, param)
    if path in ("messages", "tools") and (place := _PLACE.search(message)):
        path = _path_of(place)
    if path == param:
        return error
    if param in paths and message.startswith(f"{param} "):
        message = path + message.removeprefix(param)
    return type(error)(message, param=path)


def _path_of(place: re.Match[str]) -> str:
    if place["part"] is not None:
        return f"{place['place']}.content[{place['part']}]"
    key = place["key"] or place["role"]
    return f"{place['place']}.{key}" if key else place["place"]


def _is_writable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
