"""Turn a conversation into a prompt with the model's own chat template.

Chat templates are Jinja, written by whoever made the model, and the reference that renders them is
``transformers``. Here ``minijinja`` does, with the same settings, filters and variables: it reaches
no Python object and a fuel limit ends a template that loops or grows without bound. Two things are
outside that limit, so a template made to harm can still cost seconds and memory: nested lists
handed to ``tojson``, and the widths of ``str.format``.

One difference from the reference is known: ``trim`` and ``strip`` leave U+001C to U+001F alone,
which Python counts as white space.

``minijinja`` is imported when the first template is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

from llama_runtime.errors import BundleError, RequestError

# Fuel is spent on each instruction and on the text it makes: about 30 units a message and one for
# 15 characters of it. This is a conversation of 7 million characters, or 40 ms of a template bomb.
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
        except (TypeError, ValueError) as error:  # a filter was called with what it can't take
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


def _plain(value: Sequence[Mapping[str, object]], param: str) -> object:
    """A copy in JSON's own types, so that a template meets nothing that has methods of its own."""
    try:
        text = json.dumps([dict(item) for item in value], ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
        return json.loads(text)
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
    )


def _raise_exception(message: object) -> NoReturn:
    raise _RefusedByTemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
