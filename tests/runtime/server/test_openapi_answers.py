"""Answers and the events of streams are what the server's document says, and have nothing else."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from llama_runtime.server.openapi import openapi_document
from scripts.conformance_document import closed
from tests.runtime.server.serving import HELLO, MODEL, Serving, events_of

DOCUMENT: dict[str, Any] = json.loads(json.dumps(openapi_document(has_keys=True)))
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
HELD = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("Completion", {"prompt": ["Hello", "a"], "n": 2, "logprobs": 2}),
    ("Completion", {"prompt": [72, 105], "echo": True, "logprobs": 0, "max_tokens": 0}),
    ("Completion", {"prompt": "é€", "echo": True, "stop": "a"}),
    ("ChatCompletion", {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "n": 2}),
    ("ChatCompletion", {"messages": HELLO, "tools": TOOLS, "tool_choice": "required"}),
    ("ChatCompletion", {"messages": HELLO, "response_format": HELD}),
]


@pytest.mark.parametrize(("name", "asked"), ASKED)
def test_answers_and_events_are_what_it_says(
    server: Serving, name: str, asked: dict[str, Any]
) -> None:
    components = closed(DOCUMENT)["components"]
    path = "/v1/completions" if name == "Completion" else "/v1/chat/completions"
    body = {"model": MODEL, "max_tokens": 60, "temperature": 1.0, "seed": 2} | asked

    def check(schema: str, value: Any) -> None:
        root = {"$ref": f"#/components/schemas/{schema}", "components": components}
        jsonschema.Draft202012Validator(root).validate(value)

    check(name, server.post(path, body).json())
    more = {"stream": True, "stream_options": {"include_usage": True}}
    *events, done = events_of(server.post(path, body | more).body)
    assert done == "[DONE]"
    for event in events:
        check(f"{name}Chunk", event)
    assert events[-1]["choices"] == []
