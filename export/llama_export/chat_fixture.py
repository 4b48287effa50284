"""Make a bundle's ``chat_fixture.json``: conversations, and the reference's prompts of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from typing import Any

from llama_export.errors import ExportError
from llama_runtime.bundle_limits import MAX_TEXT_BYTES
from llama_runtime.chat_fixture import ChatCase, ChatFixture
from llama_runtime.chat_template import ChatTemplate
from llama_runtime.conversation import read_conversation
from llama_runtime.errors import BundleError, one_line

NOW = datetime(2025, 3, 1, 9, 5, 7)  # whose numbers differ, and have zeros before them
WALL_SECONDS = 60

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from llama_export.template_reference import main
main()
"""

Message = dict[str, Any]


def _turns(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _call(name: str, **arguments: object) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


_ASKED = _turns("What's the weather in Köln?", system="Be brief.")
_CALLED = {
    "role": "assistant",
    "tool_calls": [_call("get_weather", city="Köln <b>", days=3, exact=True, unit=None)],
}
_RESULT = {"role": "tool", "name": "get_weather", "content": '{"degrees": 3, "sky": "grey"}'}
TOOLS: list[Message] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather of a city, in "words" & <numbers>.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name, such as Zürich"},
                    "days": {"type": "integer", "minimum": 1},
                    "wind": {"type": "array", "items": {"enum": ["N", "S"]}},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]
# By what is special about each: the messages, and the tools.
CONVERSATIONS: dict[str, tuple[list[Message], list[Message] | None]] = {
    "a question": (_turns("Hello!"), None),
    "a system message": (_turns("Hello!", system="Be brief."), None),
    "several turns": (_turns("Hello", "Hi!", "Why?", "Because.", "Oh.", system="Be brief."), None),
    "turns without a system message": (_turns("Hello", "Hi!", "Why?"), None),
    "an answer at the end": (_turns("Hello", "Hi"), None),
    "empty texts": (_turns("", "", "", system=""), None),
    "white space": (
        _turns("  two \n\n", "\ta\r\nb\r", "\n \n", "\u00a0\u2003c\u3000", "\f\v", system=" s\n"),
        None,
    ),
    "many scripts": (_turns("日本語 🎉 é e\u0301 \u200d", "שלום ‏", "ไทย\u0000\u007f"), None),
    "control tokens and markup": (
        _turns("<|eot_id|></s>[INST] <|im_end|> <<SYS>>", "{{ messages }}{% raw %}", "<b>&'\"\\n"),
        None,
    ),
    "tools": (_ASKED, TOOLS),
    "tools without a system message": (_turns("Hello!"), TOOLS),
    "a tool call and its result": ([*_ASKED, _CALLED, _RESULT], TOOLS),
    "a tool call without tools": ([*_turns("Hello"), _CALLED, _RESULT], None),
    "two tool calls": (
        [*_ASKED, {"role": "assistant", "tool_calls": [_call("now"), _call("now")]}],
        TOOLS,
    ),
    "two questions in a row": ([*_turns("a"), *_turns("b")], None),
    "an answer first": ([{"role": "assistant", "content": "Hi"}, *_turns("a")], None),
    "a system message in the middle": ([*_turns("a", "b"), *_turns("c", system="s")], None),
    "a role of its own": ([*_turns("a"), {"role": "critic", "content": "b"}], None),
}


def make_fixture(source: str, special_tokens: Mapping[str, str]) -> ChatFixture:
    """Render the conversations as ``transformers`` does, and check that Caravan agrees.

    Args:
        source: the chat template.
        special_tokens: by the name the template has for them.

    Raises:
        ExportError: the template doesn't compile, costs too much, or Caravan renders it otherwise;
            then the message names the conversation and the first difference.
    """
    conversations = {
        name: read_conversation(messages, tools)
        for name, (messages, tools) in CONVERSATIONS.items()
    }
    asked = [
        asdict(conversation) | {"add_generation_prompt": _is_open(conversation.messages)}
        for conversation in conversations.values()
    ]
    prompts = _render_reference(source, special_tokens, asked)
    cases = [
        ChatCase(name=name, **case, prompt=prompt)
        for name, case, prompt in zip(conversations, asked, prompts, strict=True)
    ]
    fixture = ChatFixture(f"transformers' rules on jinja2 {version('jinja2')}", NOW, cases)
    try:
        fixture.check(ChatTemplate(source, special_tokens))
    except BundleError as error:
        raise ExportError(f"the runtime can't use this model's chat template: {error}") from error
    return fixture


def _is_open(messages: list[Message]) -> bool:
    """Whether it is the assistant's turn."""
    return bool(messages[-1]["role"] != "assistant")


def _render_reference(
    source: str, special_tokens: Mapping[str, str], cases: list[dict[str, Any]]
) -> list[str | None]:
    request = {
        "source": source,
        "special_tokens": dict(special_tokens),
        "now": NOW.isoformat(),
        "cases": cases,
        "max_characters": MAX_TEXT_BYTES // 8,
    }
    path = json.dumps([entry for entry in sys.path if entry])
    try:
        run = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, path],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"the chat template needs more than {WALL_SECONDS} s for {len(cases)} short "
            "conversations: this model can't be built with it"
        ) from None
    if run.returncode:
        lines = run.stderr.strip().splitlines() or ["it costs too much time or memory"]
        raise ExportError(
            f"the chat template can't be rendered by jinja2: {one_line(lines[-1], 200)}"
        )
    prompts: list[str | None] = json.loads(run.stdout)
    return prompts
