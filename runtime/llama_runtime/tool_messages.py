"""Conversations with calls of tools, from the form of OpenAI's API to what templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_runtime.conversation import MAX_NESTING, read_conversation
from llama_runtime.errors import RequestError, one_line
from llama_runtime.json_values import is_deeper, refuse_constant
from llama_runtime.tools import Tool

_CONVENTION = """\
# Tools

These functions are there for you, one definition a line:
<tools>
{definitions}
</tools>

To call some of them, write a block like this for each call:
<tool_call>
{{"name": "the name of the function", "arguments": {{"name of an argument": "its value"}}}}
</tool_call>

What they return comes back between <tool_response> and </tool_response>. If none of them helps, \
answer without a call."""


def normalise_tool_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """Give calls and results of tools the form that chat templates are written for.

    Arguments become objects, where OpenAI's API has JSON text. A result without a name gets that of
    the call with its ``tool_call_id``. Empty ``tool_calls`` go away, since templates ask only
    whether they are there.

    Args:
        messages: the turns; they are left as they are.

    Returns:
        Copies of the turns, as ``read_conversation`` makes them, with these changes.

    Raises:
        RequestError: a turn isn't well formed, or a call's arguments aren't an object.
    """
    turns = read_conversation(messages).messages
    names: dict[str, str] = {}  # of the functions called so far, by the call's id
    for index, turn in enumerate(turns):
        if turn.get("tool_calls"):
            calls = _calls(turn, f"messages[{index}]")
            turn["tool_calls"] = calls
            names |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}
        else:
            turn.pop("tool_calls", None)
        if turn["role"] == "tool":
            _name_result(turn, names, f"messages[{index}]")
    return turns


def with_tools_in_system(
    messages: Sequence[Mapping[str, object]], tools: Sequence[Tool]
) -> list[dict[str, Any]]:
    """Write tools, calls and results as text, for a template that has no place for them.

    Definitions and how to call them are appended to the system message, which is made if there is
    none. Calls become blocks of the form "hermes" in the assistant's content. Results become turns
    of the user, those that follow each other one turn: every template knows that role, and some
    insist that it takes turns with the assistant.

    Args:
        messages: the turns, in the form of OpenAI's API; they are left as they are.
        tools: the tools to show; none, if the model must not call any.

    Returns:
        Turns that have a ``role`` and a ``content`` and no calls.

    Raises:
        RequestError: as in ``normalise_tool_messages``.
    """
    written: list[dict[str, Any]] = []
    was_result = False
    for turn in normalise_tool_messages(messages):
        is_result = turn["role"] == "tool"
        if is_result:
            result = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if was_result:
                written[-1]["content"] += f"\n{result}"
            else:
                written.append({"role": "user", "content": result})
        else:
            blocks = [_block(call["function"]) for call in turn.pop("tool_calls", [])]
            content = turn.get("content", "")
            texts = [content, *blocks] if content else blocks
            written.append({**turn, "content": "\n".join(texts)})
        was_result = is_result
    return _with_definitions(written, tools) if tools else written


def _with_definitions(turns: list[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    definitions = "\n".join(json.dumps(tool.definition, ensure_ascii=False) for tool in tools)
    convention = _CONVENTION.format(definitions=definitions)
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": convention}, *turns]
    system, *others = turns
    content = f"{system['content']}\n\n{convention}" if system["content"] else convention
    return [{**system, "content": content}, *others]


def _block(function: Mapping[str, object]) -> str:
    call = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def _calls(turn: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
    calls = turn["tool_calls"]
    if turn["role"] != "assistant":
        raise _wrong(f"{place} has tool_calls, which only the assistant makes")
    if not isinstance(calls, list):
        raise _wrong(f"{place}.tool_calls must be a list of calls, not {type(calls).__name__}")
    return [_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise _wrong(f'{place} must be an object with a "function"')
    if not isinstance(function.get("name"), str):
        raise _wrong(f"{place}.function.name must be a text")
    if not isinstance(call.get("id", ""), str):
        raise _wrong(f"{place}.id must be a text")
    arguments = _arguments(function.get("arguments"), f"{place}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments(arguments: object, place: str) -> dict[str, object]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as error:
            raise _wrong(f"{place} must be an object as JSON: {one_line(error)}") from error
    if not isinstance(arguments, dict):
        raise _wrong(f"{place} must be an object, not {type(arguments).__name__}")
    if is_deeper(arguments, MAX_NESTING):
        raise _wrong(f"{place} is nested over {MAX_NESTING} levels deep: flatten it")
    try:
        json.dumps(arguments, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _wrong(f"{place} holds half of a surrogate pair, which is no character") from error
    return arguments


def _name_result(turn: dict[str, Any], names: Mapping[str, str], place: str) -> None:
    call_id = turn.get("tool_call_id", "")
    if not isinstance(call_id, str):
        raise _wrong(f"{place}.tool_call_id must be a text")
    if call_id in names:
        turn.setdefault("name", names[call_id])


def _wrong(message: str) -> RequestError:
    return RequestError(message, param="messages")
