"""Conversations with tools are written as transformers writes them, or as text where they must be.

The templates have the formats and constructs that models publish (``tool_templates``).
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llama_runtime.chat_template import ChatTemplate
from llama_runtime.errors import RequestError
from llama_runtime.tool_calls import ToolCall, parse_tool_calls
from llama_runtime.tool_messages import normalise_tool_messages, with_tools_in_system
from llama_runtime.tools import check_tools
from tests.runtime.chat_templates import LLAMA_2, LLAMA_3_1, LLAMA_3_2, SMOLLM2
from tests.runtime.tool_templates import HERMES, QWEN

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ARGUMENTS = {
    "ort": "Köln <b> \"x\" 'y' \\ 🎉",
    "tage": 3,
    "genau": True,
    "liste": [1.5, {"a": None}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "wetter",
            "description": "Das Wetter in <Köln> & 'anderswo'",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "ort": {"type": "string", "description": "Ort é"},
                    "tage": {"type": ["integer", "number"], "description": " Tage "},
                    "genau": {"type": "boolean", "description": ""},
                    "liste": {"type": "array", "items": {"type": "number"}, "description": "l"},
                },
                "required": ["ort"],
            },
        },
    },
    {"type": "function", "function": {"name": "zeit", "description": "Uhrzeit"}},
]


def called(*calls: tuple[str, str, object], content: str | None = None) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, name, arguments in calls
        ],
    }


def result(id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


ONE_CALL = [
    {"role": "system", "content": " Kurz, bitte. "},
    {"role": "user", "content": "Wetter?\n"},
    called(("c1", "wetter", json.dumps(ARGUMENTS))),
    result("c1", '{"grad": 3, "text": "<b>kühl</b>"}'),
    {"role": "assistant", "content": "3 Grad."},
    {"role": "user", "content": "Danke"},
]
TWO_CALLS = [
    {"role": "user", "content": "Wetter und Zeit?"},
    called(("c1", "wetter", json.dumps(ARGUMENTS)), ("c2", "zeit", "{}"), content="Gleich."),
    result("c1", "kalt"),
    result("c2", "spät"),
]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("with_tools", [True, False])
@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (LLAMA_3_1, ONE_CALL),
        (LLAMA_3_2, ONE_CALL),
        (HERMES, ONE_CALL),
        (HERMES, TWO_CALLS[:1]),
        (QWEN, ONE_CALL),
        (QWEN, TWO_CALLS),
    ],
)
def test_templates_write_tools_as_in_transformers(
    template: str, messages: list[dict[str, Any]], with_tools: bool, add_generation_prompt: bool
) -> None:
    tools = [dict(tool.definition) for tool in check_tools(TOOLS)] if with_tools else None
    prompt = ChatTemplate(template, SPECIAL_TOKENS).render(
        normalise_tool_messages(messages), tools=tools, add_generation_prompt=add_generation_prompt
    )
    by_hand = copy.deepcopy(messages)  # what transformers' own documents ask for
    for message in by_hand:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    (expected,), _ = render_jinja_template(
        conversations=[by_hand],
        chat_template=template,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        **SPECIAL_TOKENS,
    )
    assert prompt == expected
    assert not with_tools or "Köln" in prompt


def test_arguments_become_objects_and_results_get_names_and_nothing_else_changes() -> None:
    messages = [
        {**called(("c1", "zeit", '{"a": [1, 2.50, "\\u00e9"]}'), content="x"), "reasoning": "y"},
        result("c1", "spät"),
        {**result("c1", "?"), "name": "mine"},
        {"role": "assistant", "content": "z", "tool_calls": []},
        {"role": "assistant", "content": "z", "tool_calls": None},
    ]
    before = copy.deepcopy(messages)
    normalised = normalise_tool_messages(messages)
    assert messages == before
    assert normalised[0]["tool_calls"][0]["function"]["arguments"] == {"a": [1, 2.5, "é"]}
    assert normalised[0]["tool_calls"][0]["id"] == "c1"
    assert normalised[0]["reasoning"] == "y"
    assert normalised[1] == {**result("c1", "spät"), "name": "zeit"}
    assert normalised[2] == messages[2]
    assert normalised[3] == normalised[4] == {"role": "assistant", "content": "z"}
    assert normalise_tool_messages(normalised) == normalised


def test_a_call_goes_back_as_it_came() -> None:
    call = ToolCall("c1", "zeit", '{"a": 1}')
    turn = {"role": "assistant", "content": None, "tool_calls": [call.as_dict()]}
    assert normalise_tool_messages([turn]) == normalise_tool_messages(
        [called(("c1", "zeit", {"a": 1}))]
    )


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({**called(("c", "t", "{}")), "role": "user", "content": "x"}, "only the assistant"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "must be a list"),
        ({"role": "assistant", "tool_calls": ["x"]}, r"tool_calls\[0\] must be an object"),
        ({"role": "assistant", "tool_calls": [{"name": "t"}]}, r"tool_calls\[0\] must be"),
        (called(("c", "t", "[1]")), r"messages\[0\]\.tool_calls\[0\]\.function\.arguments.*list"),
        (called(("c", "t", "{")), "arguments must be an object as JSON"),
        (called(("c", "t", "")), "arguments must be an object as JSON"),
        (called(("c", "t", "[" * 100_000)), "arguments must be an object as JSON"),
        (called(("c", "t", '{"a": ' + "9" * 5000 + "}")), "arguments must be an object as JSON"),
        (called(("c", "t", None)), "arguments must be an object, not NoneType"),
        (called(("c", 5, "{}")), "name must be a text"),  # type: ignore[arg-type]
        (called((5, "t", "{}")), "id must be a text"),  # type: ignore[arg-type]
        ({**result("c", "x"), "tool_call_id": [1]}, "tool_call_id must be a text"),
        ({"role": "tool", "tool_call_id": "c"}, "content"),
    ],
)
def test_calls_that_are_not_well_formed_are_refused(message: dict[str, Any], said: str) -> None:
    for write in (normalise_tool_messages, lambda turns: with_tools_in_system(turns, ())):
        with pytest.raises(RequestError, match=said) as refused:
            write([message])
        assert refused.value.param == "messages"


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA_2])
@pytest.mark.parametrize("messages", [ONE_CALL, TWO_CALLS])
def test_a_template_without_a_place_for_tools_shows_all_of_the_conversation(
    template: str, messages: list[dict[str, Any]]
) -> None:
    tools = check_tools(TOOLS)
    prompt = ChatTemplate(template, SPECIAL_TOKENS).render(with_tools_in_system(messages, tools))
    for tool in tools:
        assert json.dumps(tool.definition, ensure_ascii=False) in prompt
    for message in messages:
        assert (message["content"] or "").strip() in prompt
    assert json.dumps(ARGUMENTS, ensure_ascii=False) in prompt
    assert "strict" not in prompt


def test_calls_are_written_in_the_form_that_is_read_back() -> None:
    tools = check_tools(TOOLS)
    turns = with_tools_in_system(TWO_CALLS, tools)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    read = parse_tool_calls(turns[2]["content"], "hermes", tools)
    assert read.content == "Gleich."
    assert [call.name for call in read.tool_calls] == ["wetter", "zeit"]
    assert json.loads(read.tool_calls[0].arguments) == ARGUMENTS
    assert turns[3]["content"] == (
        "<tool_response>\nkalt\n</tool_response>\n<tool_response>\nspät\n</tool_response>"
    )


def test_definitions_join_the_callers_own_system_message() -> None:
    tools = check_tools(TOOLS)
    hello = {"role": "user", "content": "Hallo"}
    parts = [{"type": "text", "text": "Kurz."}]
    made, _ = with_tools_in_system([hello], tools)
    for content in ("Kurz.", parts):
        system, *_ = with_tools_in_system([{"role": "system", "content": content}, hello], tools)
        assert system["content"] == "Kurz.\n\n" + made["content"]
    empty, *_ = with_tools_in_system([{"role": "system", "content": ""}, hello], tools)
    assert empty == made
    assert with_tools_in_system([hello], ()) == [hello]
