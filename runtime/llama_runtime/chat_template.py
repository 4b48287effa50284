"""Turn a conversation into a prompt with the model's own chat template.

Chat templates are Jinja, written by whoever made the model, and the reference that renders them is
``transformers``. Here ``minijinja`` does, with the same settings, filters and variables. A template
sees read-only copies of the messages and nothing else of Python, and a fuel limit ends one that
loops or grows without bound. Two things are outside that limit, so a template made to harm can
still cost seconds and memory: nested lists handed to ``tojson``, and the widths of ``str.format``.

One difference from the reference is known: ``trim`` and ``strip`` leave U+001C to U+001F alone,
which Python counts as white space.

``minijinja`` is imported when the first template is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from llama_runtime.errors import BundleError, RequestError

# Fuel pays for each instruction and for the text it makes. In published templates a message costs
# 25 to 45 units and one unit writes 10 to 20 characters: this is room for 10,000 messages or
# 5 million characters, and stops a template bomb within 0.1 s.
FUEL = 500_000


class ChatTemplate:
    """A compiled chat template; safe to share between threads.

    Args:
        source: the Jinja source.
        special_tokens: text of the special tokens by the name the template has for them,
            such as ``bos_token``.

    Raises:
        BundleError: if the source doesn't compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        import minijinja

        self._special_tokens: dict[str, object] = dict(special_tokens)
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=FUEL,
            debug=False,  # else errors carry a picture of the template
            filters={"tojson": _to_json},
            globals={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        )
        try:
            # Jinja reads every line ending as \n
            self._environment.add_template(
                "chat_template", source.replace("\r\n", "\n").replace("\r", "\n")
            )
        except minijinja.TemplateError as error:
            raise BundleError(f"the chat template doesn't compile: {error.message}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """Write a conversation as a prompt.

        Args:
            messages: the turns; each has a ``role`` and a ``content``, both text, and whatever
                else the template reads.
            add_generation_prompt: whether to open the assistant's next turn.
            tools: JSON schemas of the tools the model may call; None for none.

        Returns:
            The prompt, special tokens written out: for `Tokenizer.encode_templated`.

        Raises:
            RequestError: if the messages aren't well formed, or the template refuses them.
        """
        import minijinja

        _check_messages(messages)
        variables = self._special_tokens | {
            "messages": _plain(messages, "messages"),
            "tools": None if tools is None else _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._environment.render_template("chat_template", **variables)
        except _RefusedByTemplateError as error:
            problem = f"the chat template refuses these messages: {error}"
        except minijinja.TemplateError as error:
            problem = f"the chat template can't render these messages: {error.message}"
            if error.kind == "OutOfFuel":
                problem = f"the chat template needs more than {FUEL} steps: shorten the messages"
        except Exception as error:  # a method or filter was called with what it can't take
            problem = f"the chat template can't render these messages: {error}"
        raise RequestError(problem, param="messages")


class _RefusedByTemplateError(Exception):
    """What a template says through ``raise_exception``."""


def _check_messages(messages: object) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages must be a list of turns, not {type(messages).__name__}", param="messages"
        )
    if not messages:
        raise RequestError("messages is empty; at least one turn is needed", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"messages[{index}] must be an object with 'role' and 'content', "
                f"not {type(message).__name__}",
                param="messages",
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = type(message[key]).__name__ if key in message else "missing"
                raise RequestError(
                    f"messages[{index}] needs a text as '{key}'; it is {found}", param="messages"
                )


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


def _plain(value: Sequence[Mapping[str, object]], param: str) -> object:
    """A read-only copy in which there is nothing but JSON values."""
    try:
        text = json.dumps([dict(item) for item in value], ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
        return _read_only(json.loads(text))
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds a lone surrogate, U+{ord(text[error.start]):04X}: "
            "it can't be written as UTF-8, so remove it",
            param=param,
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{param} must hold JSON values only: {error}", param=param) from error


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


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
