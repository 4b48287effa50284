"""The real model keeps to schemas, and its neighbours don't notice; a slice of prove_structured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from tests.structured.answers import ask
from tests.structured.schemas import SCHEMAS

MAX_TOKENS = 24
NAMES = (  # of every kind, and short
    "label",
    "yes or no",
    "mark",
    "label in an object",
    "refund request",
    "editor settings",
    "feature flags",
    "no arguments",
    "get_weather",
    "set_thermostat",
    "linked list",
    "expression by arrays",
    "types with rules for each",
    "nullable by enum",
    "a text of format date",
    "a colour",
    "a semantic version",
    "a number of -2.5 to 7.25",
    "a multiple of 7",
    "a pair",
    "an enum of lists",
    "an enum of 500",
    "draft 7 with a tuple",
    "draft 4 with exclusive flags",
)


def test_answers_are_valid_and_neighbours_unchanged(real_bundle: Path) -> None:
    schemas = {name: SCHEMAS[name] for name in NAMES}
    with LLM(real_bundle, max_batch=16, max_len=128) as llm:
        answers = ask(llm, schemas, [0.8], MAX_TOKENS)
    assert answers.complaints == []
    assert answers.finished > len(schemas) / 3


def test_a_call_that_is_asked_for_is_made_and_its_result_is_read(real_bundle: Path) -> None:
    """The program of docs/tools.md."""
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}},
        "required": ["city"],
    }
    function = {"name": "get_weather", "description": "The weather.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": "How warm is it in Oslo?"}]
    params = SamplingParams(max_tokens=48)
    with LLM(real_bundle, max_batch=1, max_len=512) as llm:
        (asked,) = llm.chat(messages, params, tools=tools, tool_choice="required")
        (call,) = asked.tool_calls
        assert call.name == "get_weather"
        assert json.loads(call.arguments)["city"]
        messages.append({"role": "assistant", "tool_calls": [call.as_dict()]})
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 3}'}
        (answer,) = llm.chat([*messages, result], params, tools=tools)
    assert answer.tool_calls == ()
    assert "3" in (answer.content or "")
