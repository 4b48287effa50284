"""Conversations in files: JSON, with the messages as OpenAI's API takes them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_runtime.chat.conversation import Conversation
from llama_runtime.chat.parameters import GIVEN_AT_START, SETTABLE
from llama_runtime.errors import RequestError, one_line
from llama_runtime.interrupts import Held
from llama_runtime.params import SamplingParams

MAX_BYTES = 2**26  # a context of millions of tokens has less
_KEYS = ("messages", "parameters")


def save(conversation: Conversation, path: Path, *, replace_it: bool) -> None:
    """Write a conversation to a file, whole or not at all.

    Args:
        conversation: what to write. A system prompt is the first of the messages.
        path: the file.
        replace_it: whether a file that exists is replaced.

    Raises:
        RequestError: it exists, or can't be written.
    """
    params = {name: _plain(getattr(conversation.params, name)) for name in SETTABLE}
    given = {name: getattr(conversation.params, name) for name in GIVEN_AT_START}
    params |= {name: _plain(value) for name, value in given.items() if value}
    content = {"messages": conversation.with_system(conversation.messages), "parameters": params}
    text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
    try:
        if path.exists() and not path.is_file():
            raise _refuse(f"{path} is no regular file")
        if path.exists() and not replace_it:
            raise _refuse(f"{path} exists: /save! {path} replaces it")
        with Held():
            _replace(path.resolve(), text.encode("utf-8"))
    except OSError as error:
        raise _refuse(f"{path} can't be written: {error.strerror}") from error
    except UnicodeEncodeError:
        raise _refuse("the conversation holds half of a surrogate pair, which is no text") from None


def load(path: Path, params: SamplingParams) -> Conversation:
    """The conversation of a file.

    Args:
        path: as ``save`` wrote it, or by hand: "messages", and "parameters" if wanted.
        params: what holds where the file says nothing.

    Raises:
        RequestError: it can't be read, or holds something else.
    """
    content = _read(path)
    for key in content:
        if key not in _KEYS:
            raise _refuse(
                f"{path} has an unknown key {one_line(key, 40)!r}; it may have "
                f"{' and '.join(_KEYS)}"
            )
    messages = _messages(path, content.get("messages"))
    system = None
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    for index, message in enumerate(messages):
        if message["role"] not in ("user", "assistant"):
            raise _refuse(
                f"{path}: message {index + 1 + (system is not None)} is of "
                f"{one_line(message['role'], 40)!r}; after a first one of the system they are of "
                "the user and the assistant"
            )
    return Conversation(_params(path, content.get("parameters", {}), params), system, messages)


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():  # which may never end
            raise _refuse(f"{path} is no regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        content = json.loads(data) if len(data) <= MAX_BYTES else None
    except OSError as error:
        raise _refuse(f"{path} can't be read: {error.strerror}") from error
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise _refuse(f"{path} is not JSON: {one_line(error, 100)}") from error
    if len(data) > MAX_BYTES:
        raise _refuse(f"{path} has more than {MAX_BYTES:,} bytes, which is no conversation")
    if not isinstance(content, dict):
        raise _refuse(f"{path} must be a JSON object with 'messages', as /save writes it")
    return content


def _messages(path: Path, value: object) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise _refuse(f"{path} must have 'messages', a list")
    for index, message in enumerate(value, 1):
        texts = isinstance(message, dict) and message.keys() == {"role", "content"}
        if not texts or not all(isinstance(text, str) for text in message.values()):
            raise _refuse(f"{path}: message {index} must have 'role' and 'content', both text")
    return value


def _params(path: Path, value: object, params: SamplingParams) -> SamplingParams:
    if not isinstance(value, dict):
        raise _refuse(f"{path}: 'parameters' must be an object")
    for name in value:
        if name not in (*SETTABLE, *GIVEN_AT_START):
            raise _refuse(f"{path} has an unknown parameter {one_line(name, 40)!r}")
    if isinstance(bias := value.get("logit_bias"), Mapping):  # keys of JSON are texts
        value = {**value, "logit_bias": {_token_id(key): x for key, x in bias.items()}}
    try:
        return replace(params, **value)
    except RequestError as error:
        raise _refuse(f"{path}: {error}") from error


def _token_id(key: str) -> int | str:
    return int(key) if key.isascii() and key.isdecimal() and len(key) < 20 else key


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, frozenset) else value


def _refuse(message: str) -> RequestError:
    return RequestError(message, param="file")
