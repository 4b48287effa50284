"""What a caller sends as a conversation: checked, and copied into plain JSON values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_runtime.errors import RequestError, one_line
from llama_runtime.json_values import is_deeper, json_text

MAX_ROLE_CHARACTERS = 64
MAX_NESTING = 100  # of lists and objects
_ROLE = re.compile(rf"[\w.-]{{1,{MAX_ROLE_CHARACTERS}}}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages and tools as a chat template gets them.

    Attributes:
        messages: each has a word as ``role`` and a text as ``content``, which only a message with
            ``tool_calls`` may lack; and whatever else the template reads.
        tools: JSON schemas of the tools the model may call; None for none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def read_conversation(
    messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] | None = None
) -> Conversation:
    """Check a conversation and copy it.

    As in ``transformers``, a key of a message whose value is None counts as missing, because
    templates ask whether a key is there. Text parts of a content become lines of one text.

    Raises:
        RequestError: names the message that isn't well formed.
    """
    _check_list(messages)
    copies = [
        {key: value for key, value in message.items() if value is not None}
        for message in _plain(messages, "messages")
    ]
    for index, message in enumerate(copies):
        _check_role(message, f"messages[{index}]")
        _read_content(message, f"messages[{index}]")
    return Conversation(copies, None if tools is None else _plain(tools, "tools"))


def _check_list(messages: object) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise _wrong(f"messages must be a list of turns, not {type(messages).__name__}")
    if not messages:
        raise _wrong("messages is empty; at least one turn is needed")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise _wrong(
                f"messages[{index}] must be an object with 'role' and 'content', "
                f"not {type(message).__name__}"
            )


def _check_role(message: dict[str, Any], name: str) -> None:
    role = message.get("role")
    if not isinstance(role, str):
        raise _wrong(f"{name} needs a text as 'role'; it is {_kind(message, 'role')}")
    if not _ROLE.fullmatch(role):
        raise _wrong(
            f"{name} has the role {one_line(repr(role), 80)}; a role is a word of at most "
            f"{MAX_ROLE_CHARACTERS} letters, digits, '_', '-' and '.', such as 'user'"
        )


def _read_content(message: dict[str, Any], name: str) -> None:
    content = message.get("content")
    if isinstance(content, list) and content:
        parts = enumerate(content)
        message["content"] = "\n".join(_text_of(part, f"{name}, part {i}") for i, part in parts)
    elif not isinstance(content, str) and ("content" in message or not message.get("tool_calls")):
        raise _wrong(f"{name} needs a text as 'content'; it is {_kind(message, 'content')}")


def _text_of(part: object, name: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise _wrong(f"{name} is of the type {one_line(repr(kind), 80)}; only 'text' can be read")
    if not isinstance(part.get("text"), str) or len(part) > 2:
        keys = one_line(", ".join(map(repr, part)), 80)
        raise _wrong(f"{name} must have a 'type' and a text as 'text' and no more; it has {keys}")
    return str(part["text"])


def _kind(message: Mapping[str, object], key: str) -> str:
    kind = type(message[key]).__name__ if key in message else "missing"
    return "an empty list" if message.get(key) == [] else kind


def _wrong(message: str) -> RequestError:
    return RequestError(message, param="messages")


def _plain(value: Sequence[Mapping[str, object]], param: str) -> list[dict[str, Any]]:
    """A copy in which there is nothing but JSON values."""
    copy: list[dict[str, Any]] = json.loads(json_text(list(value), param))
    if is_deeper(copy, MAX_NESTING):
        raise RequestError(f"{param} is nested over {MAX_NESTING} levels deep", param=param)
    return copy
