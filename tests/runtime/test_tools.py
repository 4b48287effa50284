"""Definitions of tools and the caller's choice: what is taken, and what is refused by name."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from llama_runtime.chat_template import ChatTemplate
from llama_runtime.errors import RequestError
from llama_runtime.tools import (
    MAX_NESTING,
    MAX_TOOLS_CHARACTERS,
    check_tool_choice,
    check_tools,
    has_place_for_tools,
    tool_dialect,
)
from tests.runtime.chat_templates import LLAMA_3_1, LLAMA_3_2, SMOLLM2
from tests.runtime.tool_templates import HERMES, QWEN

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name: object = "weather", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


def test_templates_see_what_the_caller_wrote() -> None:
    definition = tool(description="Köln?", parameters=CITY, returns={"type": "string"})
    (checked,) = check_tools([definition])
    assert (checked.name, checked.parameters) == ("weather", CITY)
    assert checked.definition == definition


def test_what_no_model_was_trained_on_is_left_out_and_what_templates_read_is_there() -> None:
    asked = tool(strict=True, parameters=None)
    (checked,) = check_tools((MappingProxyType(asked),))
    assert checked.definition == tool(parameters={"type": "object", "properties": {}})
    assert asked == tool(strict=True, parameters=None)


def test_a_definition_that_is_changed_later_stays_as_it_was() -> None:
    asked = tool(parameters={"type": "object", "properties": {}})
    (checked,) = check_tools([asked])
    asked["function"]["parameters"]["properties"]["late"] = {}
    assert checked.parameters["properties"] == {}


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("weather", "must be a list"),
        ({"weather": tool()}, "must be a list"),
        (None, "must be a list"),
        ([], "has 0 definitions"),
        ([tool(f"t{i}") for i in range(129)], "has 129 definitions"),
        ([tool(), "x"], r"tools\[1\]"),
        ([{"function": {"name": "weather"}}], r"tools\[0\].*function"),
        ([{"type": "retrieval"}], r"tools\[0\]"),
        ([{"type": "function"}], r"tools\[0\]\.function must be an object, not missing"),
        ([tool("")], r"tools\[0\]\.function\.name"),
        ([tool("é")], r"tools\[0\]\.function\.name"),
        ([tool("a b")], "'a b'"),
        ([tool("a\n")], r"function\.name"),
        ([tool("a" * 65)], r"function\.name"),
        ([tool(7)], "not 7"),
        ([tool(), tool("b"), tool()], r"tools\[0\] and tools\[2\] are both called 'weather'"),
        ([tool(description=1)], r"function\.description must be a text, not int"),
        ([tool(strict="yes")], r"function\.strict"),
        ([tool(parameters=[])], r"function\.parameters must be a JSON schema"),
        ([tool(parameters={"type": "array"})], r"parameters\.type must be 'object'.*'array'"),
        ([tool(parameters={"type": ["object", "null"]})], r"parameters\.type"),
        ([tool(parameters={"properties": []})], r"parameters\.properties"),
        ([tool(parameters={"required": "city"})], r"parameters\.required"),
        ([tool(parameters={"required": [["city"]]})], r"parameters\.required"),
        ([tool(parameters={"x": {1, 2}})], "JSON values only"),
        ([tool(parameters={"x": float("nan")})], "JSON values only"),
        ([tool(description="\ud800")], "surrogate"),
        ([tool(description="a" * MAX_TOOLS_CHARACTERS)], f"{MAX_TOOLS_CHARACTERS:,} at most"),
        ([tool(parameters=nested(MAX_NESTING))], r"tools\[0\] is nested"),
        ([tool(parameters=nested(50_000))], "JSON values only"),
    ],
)
def test_wrong_definitions_are_refused_by_their_place(tools: object, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        check_tools(tools)
    assert refused.value.param == "tools"
    assert len(str(refused.value)) < 700


def test_what_may_just_be_taken_is_taken() -> None:
    check_tools([tool(f"t{i}") for i in range(128)])
    check_tools([tool("a" * 64), tool("A-_9")])
    check_tools([tool(parameters={}), tool("b", parameters={"$ref": "#/$defs/x"})])


TOOLS = check_tools([tool("a"), tool("b")])


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ("auto", TOOLS),
        ("none", ()),
        ("required", TOOLS),
        ({"type": "function", "function": {"name": "b"}}, TOOLS[1:]),
    ],
)
def test_a_choice_allows(choice: object, allowed: object) -> None:
    assert check_tool_choice(choice, TOOLS) == allowed


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("any", "'auto', 'none', 'required'"),
        (None, "must be"),
        (["auto"], "must be"),
        ({"type": "function"}, "must be"),
        ({"type": "function", "function": {"name": 3}}, "must be"),
        ({"function": {"name": "a"}}, "must be"),
        ({"type": "function", "function": {"name": "c\x1b"}}, "isn't among the tools: a, b"),
    ],
)
def test_wrong_choices_are_refused(choice: object, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        check_tool_choice(choice, TOOLS)
    assert refused.value.param == "tool_choice"
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "a"}}])
def test_a_call_needs_tools(choice: object) -> None:
    assert check_tool_choice("auto", ()) == check_tool_choice("none", ()) == ()
    with pytest.raises(RequestError, match="there are no tools"):
        check_tool_choice(choice, ())


@pytest.mark.parametrize(
    ("template", "dialect", "has_place"),
    [
        (LLAMA_3_1, "llama3_json", True),
        (LLAMA_3_2, "llama3_json", True),
        (HERMES, "hermes", True),
        (QWEN, "hermes", True),
        (SMOLLM2, "hermes", False),
        ("{{ messages[0].content }}{% if tools %}You may call tools.{% endif %}", "hermes", False),
    ],
)
def test_templates_tell_the_form_of_calls_and_whether_they_show_tools(
    template: str, dialect: str, has_place: bool
) -> None:
    assert tool_dialect(template) == dialect
    compiled = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    shows = has_place_for_tools(lambda messages, tools: compiled.render(messages, tools=tools))
    assert shows is has_place
