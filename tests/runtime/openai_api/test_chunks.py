"""What a stream says, put together, is what the whole answer says."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openai.types import Completion as OpenaiCompletion
from openai.types import CompletionChoice
from openai.types.chat import ChatCompletionChunk

from llama_runtime.bundle import open_bundle
from llama_runtime.completion import Completion
from llama_runtime.events import TokenEvent
from llama_runtime.openai_api import Head, Prepared, answer_body, parse_chat, parse_completion
from llama_runtime.openai_api.chunks import Chunks
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.sequence import TokenLogprob
from llama_runtime.tool_calls import settled_content
from llama_runtime.tools import ToolDialect
from tests.runtime.conftest import write_fake_bundle

HEAD = Head("id-1", 1_700_000_000, "m", "fp")
TURNS = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = '{"name": "look", "arguments": {"a": 1}}'
MARKED = ("<tool_call>", "</tool_call>", "<tool", f"<tool_call>\n{CALL}\n</tool_call>")
JSON = (CALL, '{"', "{ ", "[", "[{", "}", "]", '{"x": 1}')
PIECES = st.sampled_from([*MARKED, *JSON, "```", "`", "Hi", " ", "\n", ";", ",", "é", "\u2003"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    bundle = write_fake_bundle(tmp_path_factory.mktemp("bundles") / "fake")
    return PromptEncoder(open_bundle(bundle))


def with_tools(encoder: PromptEncoder, **more: Any) -> Prepared:
    body = {"model": "m", "messages": TURNS, "tools": TOOLS, **more}
    return parse_chat(body, SamplingParams(max_tokens=8)).prepared(encoder)


def chunks_of(prepared: Prepared, events: list[TokenEvent]) -> list[Any]:
    chunks = Chunks(prepared, HEAD)
    found = [chunk for event in events for chunk in chunks.take(0, event, [])]
    return [json.loads(chunk) for chunk in (*found, *chunks.end())]


def events(texts: list[str], reason: Any, *, scored: bool) -> list[TokenEvent]:
    last = len(texts) - 1
    return [
        TokenEvent(
            7,
            65 + i % 26,
            text,
            reason if i == last else None,
            logprob=TokenLogprob(65 + i % 26, -float(i)) if scored else None,
        )
        for i, text in enumerate(texts)
    ]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(PIECES, max_size=8).map("".join),
    st.lists(st.integers(0, 200), max_size=12),
    st.sampled_from(["stop", "length"]),
    st.booleans(),
)
@example(f"; {CALL}", [1], "stop", False)
@example(f" \nHi {CALL}", [3], "stop", True)
@example(f"Hi <tool_call>{CALL}", [6], "stop", False)
def test_a_streamed_answer_with_tools_is_the_whole_one(
    encoder: PromptEncoder, text: str, cuts: list[int], reason: Any, scored: bool
) -> None:
    """Wherever the tokens' borders lie."""
    prepared = with_tools(encoder, logprobs=scored)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    texts = [text[a:b] for a, b in pairwise(places)] or [""]
    happened = events(texts, reason, scored=scored)
    logprobs = [event.logprob for event in happened if event.logprob] if scored else None
    done = Completion(text, [1] * len(texts), reason, logprobs=logprobs)
    body: Any = answer_body(prepared, [[done]], HEAD)
    (choice,) = body["choices"]
    parts = [chunk["choices"][0] for chunk in chunks_of(prepared, happened)]
    deltas = [part["delta"] for part in parts]
    assert "".join(delta.get("content") or "" for delta in deltas) == (
        choice["message"]["content"] or ""
    )
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls == [call["function"] for call in choice["message"].get("tool_calls", ())]
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    entries = [one for part in parts if part["logprobs"] for one in part["logprobs"]["content"]]
    assert entries == (choice["logprobs"]["content"] if scored else [])


@given(st.lists(PIECES, max_size=6).map("".join), st.sampled_from(["hermes", "llama3_json"]))
def test_what_is_settled_stays_so(text: str, dialect: ToolDialect) -> None:
    found = [settled_content(text[:end], dialect) for end in range(len(text) + 1)]
    assert found == sorted(found)


def test_plain_text_is_streamed_though_there_are_tools(encoder: PromptEncoder) -> None:
    texts = ["No", " need", " to", " look", "."]
    parts = [
        chunk["choices"][0]["delta"].get("content")
        for chunk in chunks_of(with_tools(encoder), events(texts, "stop", scored=False))
    ]
    assert parts == ["", "No", " need", " to", " look", ".", None]


def test_chunks_are_those_of_the_client(encoder: PromptEncoder) -> None:
    """Strictly typed, and without a field that it doesn't know."""
    more = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    texts = ["Hi ", CALL]
    chunks = chunks_of(with_tools(encoder, **more), events(texts, "stop", scored=True))
    read = [ChatCompletionChunk.model_validate(one) for one in chunks]
    for one in read:
        assert not one.model_extra
        assert {"id", "object", "created", "model", "choices", "usage"} <= one.model_fields_set
    assert read[-1].choices == []
    assert read[-1].usage is not None
    assert (read[-1].usage.completion_tokens, read[0].usage) == (2, None)
    body = {"model": "m", "prompt": "a", "logprobs": 1, "echo": True}
    prepared = parse_completion(body, SamplingParams(max_tokens=8)).prepared(encoder)
    scored = Chunks(prepared, HEAD)
    event = TokenEvent(7, 65, "A", logprob=TokenLogprob(65, -1.0))
    first = [json.loads(chunk) for chunk in scored.take(0, event, [None])]
    assert [chunk["choices"][0]["text"] for chunk in first] == ["a", "A"]
    known = OpenaiCompletion.model_fields.keys(), CompletionChoice.model_fields.keys()
    assert first[1].keys() <= known[0]
    assert first[1]["choices"][0].keys() == known[1]


def test_log_probabilities_wait_for_the_text_that_a_stop_text_may_cut_off(
    encoder: PromptEncoder,
) -> None:
    body = {"model": "m", "prompt": "a", "logprobs": 0, "stop": "STOP"}
    prepared = parse_completion(body, SamplingParams(max_tokens=8)).prepared(encoder)
    token_ids = encoder.encode("abSTOP")
    shown = ["a", "b", "", "", "", ""]
    happened = [
        TokenEvent(7, one, text, logprob=TokenLogprob(one, -1.0))
        for one, text in zip(token_ids, shown, strict=True)
    ]
    happened[-1] = happened[-1]._replace(finish_reason="stop")
    given = [
        chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks_of(prepared, happened)
    ]
    assert given == [[0], [1], [2, 2, 2, 2]]
