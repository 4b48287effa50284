"""Tools that a model may call: their definitions, the caller's choice, and the forms calls take.

Definitions and choices have the form of OpenAI's API. Models write calls in one of two forms:

    llama3_json   {"name": ..., "parameters": {...}}, perhaps after <|python_tag|>: Llama 3.1 to 3.3
    hermes        {"name": ..., "arguments": {...}} between <tool_call> and </tool_call>: Hermes,
                  SmolLM2, and every model whose template has no place for tools
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama_runtime.errors import RequestError, one_line
from llama_runtime.json_values import is_deeper, json_text

MAX_TOOLS = 128
MAX_TOOLS_CHARACTERS = 2**16  # of all definitions, in which one has some hundreds
MAX_NESTING = 64  # of lists and objects in a definition
ToolDialect = Literal["llama3_json", "hermes"]

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PROBE_NAME = "probe_for_tools"
_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE_NAME,
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"value": {"type": "string", "description": "Value."}},
        },
    },
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    Attributes:
        name: 1 to 64 letters, digits, ``_`` or ``-``.
        parameters: the JSON schema of its arguments, which are an object.
        definition: what templates show to the model: the caller's own, with ``parameters`` where
            they were missing and without ``strict``, which no model was trained on.
    """

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]


def check_tools(tools: object) -> tuple[Tool, ...]:
    """Check definitions of tools, and copy them.

    Args:
        tools: 1 to 128 objects ``{"type": "function", "function": {"name": ..., "description": ...,
            "parameters": <JSON schema>}}``; a function without ``parameters`` takes none.

    Raises:
        RequestError: a definition is wrong, or all together are too long; it names the place.
    """
    if isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence):
        raise _wrong(f"tools must be a list of definitions, not {type(tools).__name__}")
    if not 1 <= len(tools) <= MAX_TOOLS:
        raise _wrong(f"tools has {len(tools)} definitions and must have 1 to {MAX_TOOLS}")
    checked = tuple(
        _tool(tool, f"tools[{index}]") for index, tool in enumerate(_json_copy(list(tools)))
    )
    places: dict[str, int] = {}
    for index, tool in enumerate(checked):
        first = places.setdefault(tool.name, index)
        if first != index:
            raise _wrong(f"tools[{first}] and tools[{index}] are both called {tool.name!r}")
    return checked


def check_tool_choice(tool_choice: object, tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """The tools that a choice allows.

    Args:
        tool_choice: "auto" (the model decides), "none" (no call), "required" (one call),
            or ``{"type": "function", "function": {"name": ...}}`` (a call of that tool).
        tools: what ``check_tools`` returned; empty where there are none.

    Returns:
        All tools, none of them, or the one that is named.

    Raises:
        RequestError: it is none of these, or what it asks for isn't among the tools.
    """
    if tool_choice == "none":
        return ()
    if tool_choice == "auto":
        return tuple(tools)
    if not tools:
        raise RequestError(
            "tool_choice asks for a call and there are no tools: give tools", param="tool_choice"
        )
    if tool_choice == "required":
        return tuple(tools)
    name = _named(tool_choice)
    for tool in tools:
        if tool.name == name:
            return (tool,)
    raise RequestError(
        f"tool_choice names {one_line(name, 80)!r}, which isn't among the tools: "
        f"{one_line(', '.join(tool.name for tool in tools))}",
        param="tool_choice",
    )


def tool_dialect(template_source: str) -> ToolDialect:
    """The form in which a model with this chat template writes calls.

    Args:
        template_source: the template's Jinja source.

    Source: the templates published with Llama 3.1, 3.2 and 3.3, and with Hermes 2 Pro and 3.
    """
    if "<tool_call>" in template_source:
        return "hermes"
    is_llama3 = "tools" in template_source and (
        "ipython" in template_source or "<|python_tag|>" in template_source
    )
    return "llama3_json" if is_llama3 else "hermes"


def has_place_for_tools(
    render: Callable[[Sequence[Mapping[str, object]], Sequence[Mapping[str, object]]], str],
) -> bool:
    """Whether a chat template shows definitions of tools to the model.

    Args:
        render: renders messages and definitions, as ``ChatTemplate.render`` does, which may refuse
            tools that the template leaves out.

    """
    try:
        return _PROBE_NAME in render([{"role": "user", "content": "Hello"}], [_PROBE_TOOL])
    except RequestError:
        return False


def _tool(tool: object, place: str) -> Tool:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise _wrong(f'{place} must be an object with "type": "function" and a "function"')
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _wrong(f"{place}.function must be an object, not {_kind(function)}")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _wrong(
            f"{place}.function.name must be 1 to 64 letters, digits, _ or -, not "
            f"{one_line(repr(name), 80)}"
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise _wrong(f"{place}.function.description must be a text, not {_kind(description)}")
    strict = function.pop("strict", None)
    if strict is not None and not isinstance(strict, bool):
        raise _wrong(f"{place}.function.strict must be true or false, not {_kind(strict)}")
    if function.get("parameters") is None:
        function["parameters"] = {"type": "object", "properties": {}}
    parameters = _object_schema(function["parameters"], f"{place}.function.parameters")
    return Tool(name=name, parameters=parameters, definition=tool)


def _object_schema(schema: object, place: str) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise _wrong(f"{place} must be a JSON schema, which is an object, not {_kind(schema)}")
    if schema.get("type", "object") != "object":
        raise _wrong(
            f"{place}.type must be 'object', since arguments have names, not "
            f"{one_line(repr(schema['type']), 80)}"
        )
    if not isinstance(schema.get("properties", {}), dict):
        raise _wrong(f"{place}.properties must be an object, not {_kind(schema['properties'])}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _wrong(f"{place}.required must be a list of names, not {one_line(required, 80)}")
    return schema


def _named(tool_choice: object) -> str:
    if isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function":
        function = tool_choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if isinstance(name, str):
            return name
    raise RequestError(
        "tool_choice must be 'auto', 'none', 'required' or "
        '{"type": "function", "function": {"name": ...}}, not '
        f"{one_line(repr(tool_choice), 80)}",
        param="tool_choice",
    )


def _json_copy(tools: list[object]) -> list[object]:
    """A copy that shares nothing with the caller's and holds JSON values only."""
    text = json_text(tools, "tools")
    if len(text) > MAX_TOOLS_CHARACTERS:
        raise _wrong(
            f"the definitions in tools have {len(text):,} characters as JSON, and "
            f"{MAX_TOOLS_CHARACTERS:,} at most: shorten them"
        )
    copied: list[object] = json.loads(text)
    for index, tool in enumerate(copied):
        if is_deeper(tool, MAX_NESTING):
            raise _wrong(f"tools[{index}] is nested over {MAX_NESTING} levels deep: flatten it")
    return copied


def _kind(value: object) -> str:
    return "missing" if value is None else type(value).__name__


def _wrong(message: str) -> RequestError:
    return RequestError(message, param="tools")
