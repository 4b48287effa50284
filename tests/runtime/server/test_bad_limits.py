"""What would take long to compile, and what asks for more than text, is refused at once."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.server.serving import HELLO, MODEL, Serving, request_bytes, serving
from tests.watched_backend import wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SECONDS = 10.0  # that nothing may take here, on any machine


@pytest.fixture(scope="module")
def limited(roomy: Path) -> Iterator[Serving]:
    with serving(roomy) as running:
        yield running
        running.wait_until_idle()


def held(schema: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    }


def out(**more: Any) -> dict[str, Any]:
    return {"structured_outputs": more}


def tool(schema: Any) -> dict[str, Any]:
    function = {"name": "look", "parameters": {"type": "object", "properties": {"a": schema}}}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


SCHEMA = "response_format.json_schema.schema"
HELD: list[tuple[dict[str, Any], str]] = [
    (held({"enum": ["x" * 70_000]}), SCHEMA),
    (held(nested(70)), SCHEMA),
    (held({"type": "string", "pattern": "("}), SCHEMA),
    (held({"type": "strin"}), SCHEMA),
    (held({"$ref": "http://elsewhere.example/schema"}), SCHEMA),
    (held({"$ref": "file:///etc/passwd"}), SCHEMA),
    (out(json="{"), "structured_outputs.json"),
    (out(regex="("), "structured_outputs.regex"),
    (out(regex="a" * 70_000), "structured_outputs.regex"),
    (out(choice=["a"] * 1025), "structured_outputs.choice"),
    (out(grammar="start: ("), "structured_outputs.grammar"),
    (out(grammar="start: start start | start"), "structured_outputs.grammar"),
    (tool({"type": "string", "pattern": "["}), "tools"),
    (tool({"type": 7}), "tools"),
]


@pytest.mark.parametrize(("more", "param"), HELD)
def test_what_cannot_be_enforced_is_refused_soon(
    limited: Serving, more: dict[str, Any], param: str
) -> None:
    began = time.monotonic()
    answer = limited.post(CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": 4, **more})
    assert (answer.status, answer.error["param"]) == (400, param), answer.error
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": "a"}},
        {"type": "text", "text": "a", "url": "file:///etc/passwd"},
    ],
)
def test_only_text_is_read_and_nothing_is_fetched(limited: Serving, part: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    answer = limited.post(CHAT, {"model": MODEL, "messages": turns})
    assert (answer.status, answer.error["param"]) == (400, "messages[0].content[1]")


@pytest.mark.parametrize(
    "name",
    [
        *("truncate_prompt_tokens", "chat_template_kwargs", "prompt_embeds", "guided_regex"),
        *("mm_processor_kwargs", "documents", "bad_words", "allowed_token_ids"),
    ],
)
def test_what_other_servers_take_is_refused_by_its_name(limited: Serving, name: str) -> None:
    for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a"})):
        answer = limited.post(path, {"model": MODEL, name: 1, **body})
        assert (answer.status, answer.error["param"]) == (400, name)


def test_turns_are_read_alike_everywhere(limited: Serving) -> None:
    for wrong, param in (
        ({"more": 1}, "messages[0].more"),
        ({"name": 5}, "messages[0].name"),
        ({"tool_call_id": 5}, "messages[0].tool_call_id"),
        ({"tool_calls": {}}, "messages[0].tool_calls"),
    ):
        turns: list[Any] = [{**HELLO[0], **wrong}]
        for path in (CHAT, "/tokenize"):
            answer = limited.post(path, {"model": MODEL, "messages": turns})
            assert (answer.status, answer.error["param"]) == (400, param)


def test_many_samples_of_many_prompts_leave_room_for_others(limited: Serving) -> None:
    """A quarter of a million completions, the most that one body may ask for."""
    body = {"model": MODEL, "prompt": ["a"] * 2048, "n": 128, "max_tokens": 1, "stream": True}
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    with limited.connect() as greedy:
        greedy.sendall(request_bytes("POST", COMPLETIONS, data, headers))
        wait_for(lambda: limited.llm.stats().finished > 0)
        assert limited.get("/health").status == 200
        small = {"model": MODEL, "prompt": "a", "max_tokens": 1}
        assert limited.post(COMPLETIONS, small).status == 200
        assert limited.service.num_active == 1, "the other one goes on"
    limited.wait_until_idle()
