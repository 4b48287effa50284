"""What a completion may be held to: a JSON schema, a regular expression, a choice, a grammar.

Here is what can be said of one without a vocabulary: that it is of the right form and size. Whether
it compiles is for ``grammars``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from llama_runtime.errors import RequestError
from llama_runtime.json_values import as_dict, is_deeper

KINDS = ("json_schema", "regex", "choice", "grammar")
MAX_CONSTRAINT_BYTES = 2**16
MAX_SCHEMA_DEPTH = 64  # objects and lists inside each other
MAX_CHOICES = 1024


class Constraint(NamedTuple):
    """What a completion is held to.

    Attributes:
        kind: one of ``KINDS``, as errors name it.
        source: its text; a choice is a JSON list.
    """

    kind: str
    source: str


def schema_text(value: Mapping[str, object] | bool | str | None) -> str | None:
    """A JSON schema as text, from an object or from text.

    Raises:
        RequestError: it is neither, or too large or too deep.
    """
    if value is None:
        return None
    if not isinstance(value, (Mapping, bool, str)):
        raise _wrong("json_schema", f"must be a JSON schema, not {type(value).__name__}")
    if isinstance(value, str):
        _sized("json_schema", value)  # before megabytes are read
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(
            schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=as_dict
        )
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError) as error:
        raise _wrong("json_schema", f"is no JSON: {error}") from error
    if schema is False:
        raise _wrong("json_schema", "allows nothing")
    if schema is True:
        return "{}"
    if not isinstance(schema, Mapping):
        raise _wrong("json_schema", f"must be an object or a boolean, not {text:.80}")
    _sized("json_schema", text)
    if is_deeper(json.loads(text), MAX_SCHEMA_DEPTH):
        raise _too_deep()
    return text


def grammar_text(param: str, value: str | None) -> str | None:
    """A regular expression or a grammar, which must be text of some length.

    Raises:
        RequestError: it isn't.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong(param, f"must be text, not {type(value).__name__}")
    if not value:
        raise _wrong(param, "is empty: leave it out")
    return _sized(param, value)


def choice_texts(value: object) -> tuple[str, ...] | None:
    """A list of texts, one of which is the completion.

    Raises:
        RequestError: it is no such list, or too long.
    """
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or not all(isinstance(text, str) for text in value):
        raise _wrong("choice", f"must be a list of texts, not {value!r:.80}")
    if len(value) > MAX_CHOICES:
        raise _wrong("choice", f"has {len(value)} texts, and {MAX_CHOICES} at most")
    if not value or not all(value):
        raise _wrong("choice", "holds an empty text" if value else "is empty: leave it out")
    _sized("choice", "".join(value))
    return tuple(value)


def check_alone(given: Mapping[str, object], min_tokens: int, *, ignore_eos: bool) -> None:
    """Refuse what can't hold together.

    Args:
        given: the constraints that are there, by name.
        min_tokens: see ``SamplingParams``.
        ignore_eos: likewise.

    Raises:
        RequestError: there are several, or one beside an option that fights with it.
    """
    if len(given) > 1:
        first, second, *_ = given
        raise _wrong(second, f"can't be given beside {first}: a completion is held to one of them")
    for option, is_set in (("min_tokens", min_tokens > 0), ("ignore_eos", ignore_eos)):
        if given and is_set:
            raise _wrong(
                option,
                f"can't be given beside {next(iter(given))}, which says where a completion ends",
            )


def _sized(param: str, text: str) -> str:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise _wrong(param, "holds half of a surrogate pair, which is no character") from None
    if size > MAX_CONSTRAINT_BYTES:
        raise _wrong(param, f"has {size:,} bytes, and {MAX_CONSTRAINT_BYTES:,} at most")
    return text


def _too_deep() -> RequestError:
    return _wrong("json_schema", f"is nested deeper than {MAX_SCHEMA_DEPTH} levels")


def _wrong(param: str, problem: str) -> RequestError:
    return RequestError(f"{param} {problem}", param=param)
