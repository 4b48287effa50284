"""Renders chat templates, as the program of a process of its own.

The reference that renders them is ``transformers``. Here ``minijinja`` does, with the same
settings, filters and variables. A template sees read-only copies of the messages and nothing else
of Python, and a fuel limit ends one that loops.

Fuel doesn't pay for everything: comparing or printing lists that hold each other, the widths of
``str.format`` and long chains of operators cost seconds, memory or the process. That is why
``template_process`` runs this module in a process with limits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from llama_runtime.limited_process import serve

# Fuel pays for each instruction and for the text it makes. In published templates a message costs
# 25 to 45 units and one unit writes 10 to 20 characters: this is room for 10,000 messages or
# 5 million characters, and stops a template that only loops within 0.1 s.
FUEL = 500_000
CPU_SECONDS = 0.5  # of one rendering
MEMORY_BYTES = 160 * 2**20  # of addresses, where the system can limit them; 19 are there at first
_GENERATION = re.compile(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})")

Answer = dict[str, str]


class Renderer:
    """A compiled template.

    Args:
        source: the Jinja source.

    Raises:
        minijinja.TemplateError: the source doesn't compile.
    """

    def __init__(self, source: str) -> None:
        import minijinja

        self._now: datetime | None = None
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=FUEL,
            debug=False,  # else errors carry a picture of the template
            filters={"tojson": _to_json},
            globals={"raise_exception": _raise_exception, "strftime_now": self._strftime_now},
        )
        # Jinja reads every line ending as \n
        source = source.replace("\r\n", "\n").replace("\r", "\n")
        # which marks for training what the assistant wrote, and is a scope like this one otherwise
        source = _GENERATION.sub(r"\1with\2", source)
        self._environment.add_template("chat_template", source)

    def render(self, variables: Mapping[str, object], now: datetime | None = None) -> Answer:
        """The text, or what went wrong by its kind: "refused", "fuel" or "render".

        Args:
            variables: JSON values.
            now: the time that ``strftime_now`` tells; None for that of the clock.
        """
        import minijinja

        self._now = now
        try:
            values = {name: _read_only(value) for name, value in variables.items()}
            return {"text": self._environment.render_template("chat_template", **values)}
        except _RefusedByTemplateError as error:
            return {"kind": "refused", "error": str(error)}
        except minijinja.TemplateError as error:
            kind = "fuel" if error.kind == "OutOfFuel" else "render"
            return {"kind": kind, "error": str(error.message)}
        except MemoryError:
            raise
        except Exception as error:  # a method or filter was called with what it can't take
            return {"kind": "render", "error": str(error)}

    def _strftime_now(self, format: str) -> str:
        return (self._now or datetime.now()).strftime(format)


def answer(request: bytes) -> Answer:
    """Compile a template and, if the request has variables, render it.

    Args:
        request: JSON with ``source``; ``variables``, which may be null; and ``now``, a time in ISO
            format or null.

    Returns:
        ``text``, or ``error`` and its ``kind``: those of ``Renderer.render``, or "compile".
    """
    import minijinja

    asked = json.loads(request)
    source, variables = asked["source"], asked["variables"]
    try:
        if source not in _compiled:
            _compiled.clear()  # one model's template is enough to keep
            _compiled[source] = Renderer(source)
    except minijinja.TemplateError as error:
        return {"kind": "compile", "error": str(error.message)}
    if variables is None:
        return {"text": ""}
    now = None if asked["now"] is None else datetime.fromisoformat(asked["now"])
    return _compiled[source].render(variables, now)


_compiled: dict[str, Renderer] = {}


def main() -> None:
    """Answer one request after the other until standard input ends."""
    import minijinja  # noqa: F401 - so that its import isn't part of the first request

    serve(
        lambda request: json.dumps(answer(request)).encode(),
        cpu_seconds=CPU_SECONDS,
        memory_bytes=MEMORY_BYTES,
    )


class _RefusedByTemplateError(Exception):
    """What a template says through ``raise_exception``."""


class _List(Sequence[object]):
    """A list that a template can't change: ``append`` and ``extend`` would cost no fuel."""

    __slots__ = ("_values",)

    def __init__(self, values: list[object]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._values[index]

    def __repr__(self) -> str:
        return repr(self._values)


class _Map(Mapping[str, object]):
    """A dictionary that a template can't change."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, object]) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __getitem__(self, key: str) -> object:
        return self._values[key]

    def __repr__(self) -> str:
        return repr(self._values)


def _read_only(value: object) -> object:
    if isinstance(value, dict):
        return _Map({key: _read_only(item) for key, item in value.items()})
    if isinstance(value, list):
        return _List([_read_only(item) for item in value])
    return value


def _writable(value: object) -> object:
    """What ``json`` asks for when it meets one of the above."""
    if isinstance(value, _Map):
        return dict(value)
    if isinstance(value, _List):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; templates are written for this one of ``transformers``."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_writable,
    )


def _raise_exception(message: object) -> NoReturn:
    raise _RefusedByTemplateError(message)
