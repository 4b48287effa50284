"""The official client drives every route, and gets what the facade gives."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import openai
import pytest

from llama_runtime import __version__
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from tests.runtime.server.serving import HELLO, MODEL, Serving, events_of

TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "wait")
]
PROMPTS: Any = ["one", "number two", [5, 6, 7]]
SAMPLED: Any = {"temperature": 1.0, "seed": 5, "max_tokens": 9}


@pytest.fixture(scope="module")
def llm(server: Serving, roomy: Path) -> Iterable[LLM]:
    with LLM(roomy, max_batch=4, max_len=2048, threads=1) as loaded:
        yield loaded


def joined(chunks: Iterable[Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, put together as a client does."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        assert chunk.model == MODEL
        for part in chunk.choices:
            kept = choices.setdefault(
                part.index, {"text": "", "logprobs": [], "calls": [], "reason": None, "roles": []}
            )
            assert kept["reason"] is None, "nothing follows the end of a choice"
            delta = getattr(part, "delta", None)
            kept["text"] += (part.text if delta is None else delta.content) or ""
            if delta is not None:
                kept["roles"].append(delta.role)
                kept["calls"] += delta.tool_calls or []
            if part.logprobs is not None:
                named = part.logprobs.tokens if delta is None else part.logprobs.content
                kept["logprobs"] += named
            kept["reason"] = part.finish_reason
    return choices


def test_completions_are_those_of_the_facade(client: openai.OpenAI, llm: LLM) -> None:
    expected = llm.generate(PROMPTS, SamplingParams(**SAMPLED, n=2))
    whole = client.completions.create(model=MODEL, prompt=PROMPTS, n=2, **SAMPLED)
    assert [choice.text for choice in whole.choices] == [one.text for one in expected]
    assert [choice.index for choice in whole.choices] == list(range(6))
    generated = sum(len(one.token_ids) for one in expected)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (16, generated)

    stream = client.completions.create(
        model=MODEL,
        prompt=PROMPTS,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        **SAMPLED,
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.usage == whole.usage
    assert {chunk.usage for chunk in chunks} == {None}
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    choices = joined(chunks)
    assert [choices[i]["text"] for i in range(6)] == [one.text for one in expected]
    assert [choices[i]["reason"] for i in range(6)] == [one.finish_reason for one in expected]


def test_chats_are_those_of_the_facade(client: openai.OpenAI, llm: LLM) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "n": 3, "logprobs": True, **SAMPLED}
    expected = llm.chat(HELLO, SamplingParams(**SAMPLED, n=3))
    whole = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in whole.choices] == [
        one.finish_reason for one in expected
    ]
    assert whole.system_fingerprint is not None
    assert whole.usage is not None
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert {chunk.usage for chunk in chunks} == {None}
    choices = joined(chunks)
    for index, choice in enumerate(whole.choices):
        assert choices[index]["text"] == choice.message.content
        assert choices[index]["reason"] == choice.finish_reason
        assert choices[index]["roles"][0] == "assistant"
        assert set(choices[index]["roles"][1:]) <= {None}
        assert choice.logprobs is not None
        assert choices[index]["logprobs"] == choice.logprobs.content


def test_a_stop_text_ends_a_stream_and_stays_out_of_it(client: openai.OpenAI, llm: LLM) -> None:
    (free,) = llm.generate("Hello", SamplingParams(max_tokens=40))
    stop = free.text[20:23]
    kept = free.text[: free.text.index(stop)]
    for logprobs in (None, 1):
        stream = client.completions.create(
            model=MODEL, prompt="Hello", max_tokens=40, stop=[stop], stream=True, logprobs=logprobs
        )
        choice = joined(stream)[0]
        assert (choice["text"], choice["reason"]) == (kept, "stop")


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_an_echoed_prompt_is_scored_in_a_stream_too(server: Serving, max_tokens: int) -> None:
    """As evaluations ask for it; the client knows no null among log-probabilities."""
    asked = {"model": MODEL, "prompt": ["Hello é€😀!", [72, 105]], "echo": True, "logprobs": 1}
    asked["max_tokens"] = max_tokens
    whole = server.post("/v1/completions", asked).json()
    *chunks, end = events_of(server.post("/v1/completions", asked | {"stream": True}).body)
    assert end == "[DONE]"
    for choice in whole["choices"]:
        parts = [
            part
            for chunk in chunks
            for part in chunk["choices"]
            if part["index"] == choice["index"]
        ]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            given = [one for part in parts if part["logprobs"] for one in part["logprobs"][name]]
            assert given == values


def test_a_call_that_is_asked_for_comes_whole(client: openai.OpenAI) -> None:
    asked: Any = {
        "model": MODEL,
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": "required",
        "max_tokens": 200,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.tool_calls is not None
    (call,) = whole.message.tool_calls
    choice = joined(client.chat.completions.create(**asked, stream=True))[0]
    (streamed,) = choice["calls"]
    assert whole.finish_reason == choice["reason"] == "tool_calls"
    assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
    assert streamed.function.name == call.function.name
    assert streamed.function.arguments == call.function.arguments
    assert (streamed.index, streamed.type, choice["text"]) == (0, "function", "")
    assert whole.logprobs is not None
    assert choice["logprobs"] == whole.logprobs.content

    with client.chat.completions.stream(**asked) as stream:  # which puts chunks together itself
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == call.function.arguments


def test_an_answer_is_held_to_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    held: Any = {
        "type": "json_schema",
        "json_schema": {
            "name": "a",
            "schema": {**schema, "additionalProperties": False},
            "strict": True,
        },
    }
    asked: Any = {"model": MODEL, "messages": HELLO, "response_format": held, "max_tokens": 300}
    whole = client.chat.completions.create(**asked).choices[0]
    choice = joined(client.chat.completions.create(**asked, stream=True))[0]
    assert whole.message.content == choice["text"]
    assert json.loads(choice["text"])["a"] in (1, 2)


def test_models_are_listed_and_found_by_their_names(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "caravan"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other/one' here"):
        client.models.retrieve("other/one")
    with pytest.raises(openai.NotFoundError) as refusal:
        client.completions.create(model="other", prompt="a")
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


def test_text_and_tokens_become_each_other(server: Serving, llm: LLM) -> None:
    text = "Hello é<|im_end|>!"
    found = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == llm.tokenizer.encode(text)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 2048)
    assert found["token_strs"][:3] == ["H", "e", "l"]
    assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = server.post("/tokenize", {"messages": HELLO, "model": MODEL}).json()
    assert chat["tokens"] == llm.chat_prompt(HELLO)
    unopened = {"messages": HELLO, "add_generation_prompt": False, "tools": TOOLS}
    assert server.post("/tokenize", unopened).json()["count"] > chat["count"]


def test_usage_says_how_much_of_a_prompt_was_computed_before(
    server: Serving, client: openai.OpenAI
) -> None:
    """In blocks of 32; of several samples what none of them had to compute."""

    def cached(prompt: Any, **more: Any) -> int:
        before = server.llm.stats().reused_tokens
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": 2, **more}
        if more.get("stream"):
            *_, last = client.completions.create(**asked, stream_options={"include_usage": True})
        else:
            last = client.completions.create(**asked)
        server.wait_until_idle()
        found: int = last.usage.prompt_tokens_details.cached_tokens
        assert found <= server.llm.stats().reused_tokens - before
        return found

    first, second = "an unheard-of prompt " * 10, "another one " * 10  # 210 and 120 tokens
    assert cached(first) == 0
    assert cached(first) == cached(first, stream=True) == 192
    assert cached(second, n=3) == 0
    assert cached([first, second, "third"], n=2) == 192 + 96
    chat = {"model": MODEL, "messages": HELLO * 8, "max_tokens": 1}
    server.post("/v1/chat/completions", chat)
    usage = server.post("/v1/chat/completions", chat).json()["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_what_says_how_it_is_says_so(server: Serving) -> None:
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ping").json() == {"status": "ok"}
    assert server.get("/ready").json() == {"status": "ready"}
    assert server.get("/version").json() == {"version": __version__}


def test_a_request_keeps_its_name(server: Serving) -> None:
    assert server.get("/version", **{"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    names = {
        server.get("/version", **{"X-Request-Id": name}).headers["x-request-id"]
        for name in ("a b", 'x"y', "x" * 200)
    }
    assert len(names) == 3
    assert all(len(name) == 24 for name in names), "what could tear a log is replaced"
