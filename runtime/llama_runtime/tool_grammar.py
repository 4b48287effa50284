"""The grammar of calls, where a model has to call a tool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_runtime.errors import RequestError
from llama_runtime.schema_rules import BrokenRuleError, kept_schema
from llama_runtime.tools import Tool, ToolDialect, check_tool_choice

# As templates write calls in a conversation's past. White space is fixed: where it is free, a small
# model can go on with it until its tokens are used up.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_BEFORE = {
    "hermes": '<tool_call>\n{{"name": "{}", "arguments": ',
    "llama3_json": '{{"name": "{}", "parameters": ',
}
_AFTER = {"hermes": "}\n</tool_call>", "llama3_json": "}"}
# Keywords that may allow or ask for arguments that ``properties`` doesn't name.
_COMBINING = {"$ref", "$dynamicRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"}
_NAMING = {"additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"}


def tool_grammar(
    tools: Sequence[Tool],
    tool_choice: object,
    dialect: ToolDialect,
) -> str | None:
    """The grammar to which an answer is held, so that it is a call.

    Each schema stays a document of its own in it, so that references in one, ``#/$defs/...``, mean
    what they meant before.

    Args:
        tools: the tools there are.
        tool_choice: as in ``check_tool_choice``.
        dialect: the form of the calls.

    Returns:
        Lark as ``llguidance`` reads it; None for "auto" and "none", which bind nobody. Whether it
        can enforce all that the schemas ask for shows when it is compiled.

    Raises:
        RequestError: the choice is wrong, or a rule of a tool's parameters wouldn't be kept.
    """
    allowed = check_tool_choice(tool_choice, tools)
    if tool_choice in ("auto", "none"):
        return None
    rules = ["start: call", f"call: {' | '.join(f'call_{i}' for i in range(len(allowed)))}"]
    for index, tool in enumerate(allowed):
        before = _quoted(_BEFORE[dialect].format(tool.name))
        rules.append(f"call_{index}: {before} arguments_{index} {_quoted(_AFTER[dialect])}")
        try:
            parameters = kept_schema(dict(tool.parameters))
        except BrokenRuleError as error:
            raise RequestError(
                f"the parameters of the tool {tool.name!r} can't be enforced: {error}",
                param="tools",
            ) from error
        schema = json.dumps(_arguments_schema(parameters), ensure_ascii=False)
        rules.append(f"arguments_{index}: %json {schema}")
    return "\n".join(rules) + "\n"


def rule_index(line: int) -> int | None:
    """Which of the allowed tools a line of the grammar is about, from 1 on; None if none alone."""
    return (line - 3) // 2 if line > 2 else None


def _arguments_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments, with no more names than it gives.

    A schema that is silent about other names allows them; but a function takes the arguments it
    has, and a model would invent some.
    """
    schema = {**parameters, "type": "object", "x-guidance": _LAYOUT}
    is_silent = "properties" in schema and not (_COMBINING | _NAMING) & schema.keys()
    if is_silent and set(schema.get("required", ())) <= schema["properties"].keys():
        schema["additionalProperties"] = False
    return schema


def _quoted(text: str) -> str:
    return json.dumps(text)
