"""What the official client can ask for has its effect, and what goes wrong is its own exception."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from llama_runtime.llm import LLM
from llama_runtime.openai_api.logprobs import token_name
from llama_runtime.params import SamplingParams
from llama_runtime.server import ServerSettings, failures
from tests.runtime.server.serving import HELLO, MODEL, Serving, serving, stream_bytes
from tests.watched_backend import wait_for

TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "wait")
]
TURNS: Any = HELLO
SAMPLED: Any = {"temperature": 1.0, "seed": 5, "max_tokens": 9}


@pytest.fixture(scope="module")
def llm(server: Serving, roomy: Path) -> Iterator[LLM]:
    with LLM(roomy, max_batch=4, max_len=2048, threads=1) as loaded:
        yield loaded


def texts(client: openai.OpenAI, prompt: Any, **more: Any) -> list[str]:
    """The texts of a completion, which must be the same as a stream."""
    asked: Any = {"model": MODEL, "prompt": prompt, **SAMPLED, **more}
    whole = client.completions.create(**asked)
    parts = [""] * len(whole.choices)
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert parts == [choice.text for choice in whole.choices]
    return parts


def chat_text(client: openai.OpenAI, **more: Any) -> str:
    """The same of a chat."""
    asked: Any = {"model": MODEL, "messages": HELLO, **SAMPLED, **more}
    (choice,) = client.chat.completions.create(**asked).choices
    stream = client.chat.completions.create(**asked, stream=True)
    parts = [part.choices[0].delta.content or "" for part in stream]
    assert "".join(parts) == choice.message.content
    return "".join(parts)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("one", ["one"]),
        (["one", "number two"], ["one", "number two"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6, 7], [8]], [[5, 6, 7], [8]]),
    ],
)
def test_a_prompt_has_one_of_four_forms(
    client: openai.OpenAI, llm: LLM, prompt: Any, prompts: Any
) -> None:
    made = llm.generate(prompts, SamplingParams(**SAMPLED))
    assert texts(client, prompt) == [one.text for one in made]


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"frequency_penalty": 2.0}, {"frequency_penalty": 2.0}),
    ({"presence_penalty": -2.0}, {"presence_penalty": -2.0}),
    ({"logit_bias": {"72": 100}}, {"logit_bias": {72: 100.0}}),
    ({"top_p": 0.3}, {"top_p": 0.3}),
    ({"seed": 11}, {"seed": 11}),
    ({"extra_body": {"top_k": 2}}, {"top_k": 2}),
    ({"extra_body": {"repetition_penalty": 5.0}}, {"repetition_penalty": 5.0}),
]


@pytest.mark.parametrize(("asked", "option"), OPTIONS)
def test_an_option_does_what_it_does_in_the_facade(
    client: openai.OpenAI, llm: LLM, asked: dict[str, Any], option: dict[str, Any]
) -> None:
    longer = {**SAMPLED, "max_tokens": 20}
    params = SamplingParams(**{**longer, **option})
    (made,) = llm.generate("Hello", params)
    (plain,) = llm.generate("Hello", SamplingParams(**longer))
    assert made.token_ids != plain.token_ids, "else it has no effect here"
    assert texts(client, "Hello", **{**longer, **asked}) == [made.text]
    (spoken,) = llm.generate([llm.chat_prompt(HELLO)], params)
    assert chat_text(client, **{**longer, **asked}) == spoken.text


def test_likeliest_tokens_are_those_of_the_facade(client: openai.OpenAI, llm: LLM) -> None:
    (made,) = llm.generate(
        [llm.chat_prompt(HELLO)], SamplingParams(**SAMPLED, logprobs=True, top_logprobs=3)
    )
    (choice,) = client.chat.completions.create(
        model=MODEL, messages=TURNS, logprobs=True, top_logprobs=3, **SAMPLED
    ).choices
    assert choice.logprobs is not None
    assert made.logprobs is not None
    assert choice.logprobs.content is not None
    for entry, item in zip(choice.logprobs.content, made.logprobs, strict=True):
        assert (entry.token, entry.logprob) == (
            token_name(llm.tokenizer, item.token_id),
            item.logprob,
        )
        likely = [(token_name(llm.tokenizer, one), logprob) for one, logprob in item.top]
        assert [(top.token, top.logprob) for top in entry.top_logprobs] == likely
    (echo,) = client.completions.create(
        model=MODEL, prompt="Hi", echo=True, logprobs=2, **SAMPLED
    ).choices
    assert echo.text.startswith("Hi")
    assert echo.logprobs is not None
    assert echo.logprobs.tokens is not None
    assert echo.logprobs.tokens[:2] == ["H", "i"]


def test_an_object_can_be_asked_for(client: openai.OpenAI) -> None:
    text = chat_text(client, response_format={"type": "json_object"}, max_tokens=300)
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("choice", "called"),
    [
        ("none", None),
        ("auto", None),
        ("required", {"look", "wait"}),
        ({"type": "function", "function": {"name": "wait"}}, {"wait"}),
    ],
)
def test_each_choice_of_tools(client: openai.OpenAI, choice: Any, called: set[str] | None) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "tools": TOOLS, "tool_choice": choice}
    whole = client.chat.completions.create(**asked, max_tokens=200).choices[0]
    calls = whole.message.tool_calls
    assert (whole.finish_reason == "tool_calls") is (called is not None)
    names = {one.function.name for one in calls or [] if one.type == "function"}
    assert names <= (called or set())
    assert bool(names) is bool(called)
    with client.chat.completions.stream(**asked, max_tokens=200) as stream:
        list(stream)
        message = stream.current_completion_snapshot.choices[0].message
    streamed = [one.function for one in message.tool_calls or []]
    assert [(one.name, one.arguments) for one in streamed] == [
        (one.function.name, one.function.arguments) for one in calls or [] if one.type == "function"
    ]
    assert (message.content or "") == (whole.message.content or "")


def test_a_stream_of_a_chat_ends_with_its_usage(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, **SAMPLED}
    usage = client.chat.completions.create(**asked).usage
    *chunks, last = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == []
    assert usage is not None
    assert last.usage is not None
    assert last.usage.total_tokens == usage.total_tokens == usage.prompt_tokens + 9


def test_what_goes_wrong_is_an_exception_of_its_kind(server: Serving, roomy: Path) -> None:
    with server.client() as client:
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model=MODEL, prompt="a", n=1000)
        assert (wrong.value.param, wrong.value.type) == ("n", "invalid_request_error")
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model=MODEL, prompt="a", max_tokens=10**6)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.PermissionDeniedError):
            client.completions.create(
                model=MODEL, prompt="a", extra_headers={"Origin": "http://elsewhere.example"}
            )
        assert server.backend.failure is None
    with serving(roomy, ServerSettings(request_timeout=0.2)) as slow, slow.client() as client:
        slow.backend.hang_after(0)
        with pytest.raises(openai.InternalServerError) as late:
            client.completions.create(model=MODEL, prompt="a")
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        slow.backend.go_on()


def test_an_error_inside_a_stream_is_raised(roomy: Path) -> None:
    with serving(roomy) as server, server.client() as client:
        server.backend.hang_after(3)
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=90, stream=True)
        next(iter(stream))
        server.backend.wait_until_it_hangs()
        server.backend.failure = RuntimeError("/secret/path")
        server.backend.go_on()
        with pytest.raises(openai.APIError) as broken:
            list(stream)
        assert "secret" not in str(broken.value)
        with pytest.raises(openai.InternalServerError) as dead:
            client.completions.create(model=MODEL, prompt="a")
        assert dead.value.status_code == 503


def test_a_full_server_is_asked_again(roomy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client obeys ``Retry-After`` by itself, and raises its own error where it may not."""
    monkeypatch.setattr(failures, "RETRY_SECONDS", "0.05")
    with serving(roomy, max_batch=1, max_queued_requests=1) as server:
        server.backend.hang_after(0)
        with server.connect() as first:
            first.sendall(stream_bytes(3))
            server.backend.wait_until_it_hangs()
            wait_for(lambda: server.llm.stats().waiting == 1)
            asked: Any = {"model": MODEL, "prompt": "a", "max_tokens": 1}
            with server.client() as client, pytest.raises(openai.RateLimitError) as full:
                client.completions.create(**asked)
            assert full.value.code == "rate_limit_exceeded"

            def make_room() -> None:
                wait_for(lambda: server.service.tally.refused[429] > 2)
                server.backend.go_on()

            with server.client(retries=50) as client, ThreadPoolExecutor(1) as pool:
                room = pool.submit(make_room)
                answer = client.completions.with_raw_response.create(**asked)
                room.result()
            assert answer.retries_taken >= 2
            assert answer.parse().choices[0].finish_reason == "length"
