"""What comes back is what the ``openai`` package reads, and what the engine made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai import BaseModel
from openai.types import Completion as OpenaiCompletion
from openai.types.chat import ChatCompletion
from tokenizers import processors

from llama_runtime.bundle import open_bundle
from llama_runtime.completion import Completion
from llama_runtime.errors import BackendError, CapacityError, CaravanError, RequestError
from llama_runtime.llm import LLM
from llama_runtime.openai_api import (
    Head,
    Prepared,
    answer_body,
    parse_chat,
    parse_completion,
)
from llama_runtime.openai_api.logprobs import echoed, prompt_offsets, token_name
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.sequence import TokenLogprob
from tests.runtime import chat_encoders
from tests.runtime.conftest import write_roomy_bundle

TURNS = [{"role": "user", "content": "Hello"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "wait")
]
HEAD = Head("cmpl-1", 1_700_000_000, "m", "abc")
DEFAULTS = SamplingParams(max_tokens=12)


@pytest.fixture
def encoder(fake_bundle: Path) -> PromptEncoder:
    return PromptEncoder(open_bundle(fake_bundle))


@pytest.fixture
def roomy_bundle(tmp_path: Path) -> Path:
    return write_roomy_bundle(tmp_path / "roomy_bundle")


@pytest.fixture
def roomy(roomy_bundle: Path) -> PromptEncoder:
    return PromptEncoder(open_bundle(roomy_bundle))


@pytest.fixture
def roomy_llm(fake_backend: None, roomy_bundle: Path) -> Iterator[LLM]:
    with LLM(roomy_bundle, max_batch=2, max_len=2048, threads=1) as loaded:
        yield loaded


def chat(encoder: PromptEncoder, **more: Any) -> Prepared:
    return parse_chat({"model": "m", "messages": TURNS, **more}, DEFAULTS).prepared(encoder)


def completion(encoder: PromptEncoder, **more: Any) -> Prepared:
    return parse_completion({"model": "m", "prompt": "Hi", **more}, DEFAULTS).prepared(encoder)


def run(llm: LLM, prepared: Prepared) -> list[list[Completion]]:
    """The completions of each prompt, as they end."""
    found: list[list[Completion]] = [[] for _ in prepared.prompts]
    for index, one in llm.run(prepared.requests):
        found[index].append(one)
    return found


def read(kind: type[BaseModel], body: dict[str, Any]) -> Any:
    """The body as the client has it: whole, strictly typed, and without a field it doesn't know."""
    parsed = kind.model_validate(json.loads(json.dumps(body)), strict=True)
    check_known(parsed)
    assert {"id", "object", "created", "model", "choices", "usage"} <= parsed.model_fields_set
    return parsed


def check_known(value: object) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, type(value)
        for name in value.model_fields_set:
            check_known(getattr(value, name))
    for item in value if isinstance(value, list) else ():
        check_known(item)


def test_a_served_chat_is_that_of_the_facade(fake_llm: LLM, encoder: PromptEncoder) -> None:
    prepared = chat(
        encoder,
        n=3,
        temperature=1.0,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        ignore_eos=True,  # end tokens of the fake model are letters, which are in no text
    )
    answer = read(ChatCompletion, answer_body(prepared, run(fake_llm, prepared), HEAD))
    expected = fake_llm.chat(TURNS, prepared.params)
    assert [choice.message.content for choice in answer.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in answer.choices] == [
        one.finish_reason for one in expected
    ]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.refusal is None
    assert answer.choices[0].message.tool_calls is None
    assert (answer.id, answer.created, answer.model) == ("cmpl-1", 1_700_000_000, "m")
    assert (answer.object, answer.system_fingerprint) == ("chat.completion", "abc")
    for choice, one in zip(answer.choices, expected, strict=True):
        assert len(choice.logprobs.content) == len(one.token_ids)
        data = b"".join(bytes(item.bytes or ()) for item in choice.logprobs.content)
        assert data.decode("utf-8", errors="replace") == choice.message.content
        for item, scored in zip(choice.logprobs.content, one.logprobs or (), strict=True):
            assert item.logprob == scored.logprob
            assert [top.logprob for top in item.top_logprobs] == [p for _, p in scored.top]
            assert len(item.top_logprobs) == 2


def test_prompts_and_samples_are_numbered_and_a_prompt_is_counted_once(
    fake_llm: LLM, encoder: PromptEncoder
) -> None:
    prompts: list[Any] = ["one", "number two", [5, 6, 7]]
    prepared = completion(encoder, prompt=prompts, n=2, temperature=1.0, seed=3, max_tokens=9)
    done = run(fake_llm, prepared)
    answer = read(OpenaiCompletion, answer_body(prepared, done, HEAD))
    expected = fake_llm.generate(prompts, prepared.params)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    reasons = [choice.finish_reason for choice in answer.choices]
    assert reasons == [one.finish_reason for one in expected]
    assert set(reasons) == {"stop", "length"}
    assert {choice.logprobs for choice in answer.choices} == {None}
    generated = sum(len(one.token_ids) for one in expected)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (16, generated)
    assert answer.usage.total_tokens == 16 + generated
    turned = answer_body(prepared, [some[::-1] for some in done], HEAD)
    assert turned == answer_body(prepared, done, HEAD), "in whatever order they ended"


def test_without_log_probabilities_there_are_none(fake_llm: LLM, encoder: PromptEncoder) -> None:
    for prepared in (chat(encoder), completion(encoder)):
        body: Any = answer_body(prepared, run(fake_llm, prepared), HEAD)
        assert [choice["logprobs"] for choice in body["choices"]] == [None]


def places(text: str, offsets: Sequence[int]) -> list[str]:
    """The text from each offset to the next."""
    return [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)]


@pytest.mark.parametrize("prompt", ["Hello é€😀!", list(b"Hi there")])
@pytest.mark.parametrize("max_tokens", [0, 1, 12])
def test_an_echo_has_the_prompt_and_its_log_probabilities(
    fake_llm: LLM, encoder: PromptEncoder, prompt: Any, max_tokens: int
) -> None:
    """As evaluations ask for it: what the tokens before them say of a prompt's tokens."""
    asked = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "ignore_eos": True}
    prepared = completion(encoder, prompt=prompt, **asked)
    body: Any = answer_body(prepared, run(fake_llm, prepared), HEAD)
    params = replace(prepared.params, max_tokens=max(max_tokens, 1))
    (whole,) = fake_llm.generate(prompt, params)
    choice, logprobs = body["choices"][0], body["choices"][0]["logprobs"]
    start = echoed(encoder.tokenizer, prompt)
    assert choice["text"] == start + (whole.text if max_tokens else "")
    assert body["usage"]["completion_tokens"] == (len(whole.token_ids) if max_tokens else 0)
    assert choice["finish_reason"] == (whole.finish_reason if max_tokens else "length")

    token_ids = prepared.prompts[0] + (whole.token_ids if max_tokens else [])
    scored = (whole.prompt_logprobs or []) + ((whole.logprobs or []) if max_tokens else [])
    assert len(logprobs["tokens"]) == len(token_ids) == len(scored)
    assert logprobs["tokens"] == [token_name(encoder.tokenizer, one) for one in token_ids]
    assert logprobs["token_logprobs"] == [one and one.logprob for one in scored]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    for name, value, top in list(
        zip(*(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[1:]:
        assert top[name] == value, "the token itself is always there"
        assert 1 <= len(top) <= 2
        assert max(top.values()) >= value
    texts = places(choice["text"], logprobs["text_offset"])
    assert "".join(texts) == choice["text"]
    for name, text in zip(logprobs["tokens"], texts, strict=True):
        assert text == name or name.startswith(("bytes:", "<|"))

    logprobs["token_logprobs"][0], logprobs["top_logprobs"][0] = 0.0, {}  # null at OpenAI too
    read(OpenaiCompletion, body)


def test_what_only_scores_a_prompt_never_ends_by_itself(encoder: PromptEncoder) -> None:
    """Whatever the token is that the engine made for it."""
    prepared = completion(encoder, echo=True, max_tokens=0)
    body: Any = answer_body(prepared, [[Completion("", [257], "stop")]], HEAD)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


def test_a_token_that_a_stop_text_cut_off_is_at_the_end(encoder: PromptEncoder) -> None:
    prepared = completion(encoder, logprobs=0, stop="STOP")
    token_ids = encoder.encode("abSTOP")
    scored = [TokenLogprob(token_id, float("-inf")) for token_id in token_ids]
    cut = Completion("ab", token_ids, "stop", stop_text="STOP", logprobs=scored)
    body: Any = answer_body(prepared, [[cut]], HEAD)
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 2, 2, 2]
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0] * 6, "JSON has no infinity"
    read(OpenaiCompletion, body)


def test_tokens_are_called_by_their_text_or_else_by_what_they_are(encoder: PromptEncoder) -> None:
    tokenizer = encoder.tokenizer
    (first, *_), (letter,) = encoder.encode("é"), encoder.encode("a")
    assert token_name(tokenizer, letter) == "a"
    assert token_name(tokenizer, first) == "bytes:\\xc3"
    assert token_name(tokenizer, 257) == "<|im_end|>"
    assert token_name(tokenizer, 999) == "token_id:999"


@pytest.mark.parametrize("kind", chat_encoders.TOKENIZERS)
@pytest.mark.parametrize("text", ["a bc", " a", "a", "a  bc é!", "<s>a bc</s> a"])
def test_tokens_of_a_prompt_are_where_its_text_has_them(
    tmp_path: Path, kind: str, text: str
) -> None:
    """Also where the tokenizer puts a token before them all, which is in no text."""
    backend = chat_encoders.make(kind)
    opening = backend.token_to_id("<s>")
    if opening is not None:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", opening)])
    encoder = chat_encoders.encoder(tmp_path, backend, "{{ messages }}")
    tokenizer, token_ids = encoder.tokenizer, encoder.encode(text)
    assert opening is None or token_ids[0] == opening
    offsets = list(prompt_offsets(tokenizer, text, token_ids))
    assert offsets == sorted(offsets)
    for token_id, found in zip(token_ids, places(text, offsets), strict=True):
        name = token_name(tokenizer, token_id)
        if token_id == opening and not text.startswith("<s>"):
            assert found == ""
        elif not name.startswith("bytes:"):
            assert found in (name, name.removeprefix(" "))


CALL = '<tool_call>\n{"name": "look", "arguments": {"a": 1}}\n</tool_call>'


def test_what_an_answer_calls_is_a_call(roomy: PromptEncoder) -> None:
    prepared = chat(roomy, tools=TOOLS, n=3)
    done = [
        Completion(f"Let me see.\n{CALL}", [1, 2], "stop", sample=0),
        Completion(CALL, [1], "length", sample=1),
        Completion("No need.", [1], "stop", sample=2),
    ]
    said, cut, plain = read(ChatCompletion, answer_body(prepared, [done], HEAD)).choices
    assert (said.finish_reason, said.message.content) == ("tool_calls", "Let me see.")
    (call,) = said.message.tool_calls
    assert (call.type, call.function.name) == ("function", "look")
    assert json.loads(call.function.arguments) == {"a": 1}
    assert (cut.finish_reason, cut.message.content) == ("length", CALL)
    assert (plain.finish_reason, plain.message.content) == ("stop", "No need.")
    assert cut.message.tool_calls is plain.message.tool_calls is None

    alone = chat(roomy, tools=TOOLS)
    (only,) = read(
        ChatCompletion, answer_body(alone, [[replace(done[0], text=CALL)]], HEAD)
    ).choices
    assert (only.finish_reason, only.message.content) == ("tool_calls", None)
    untold = chat(roomy, tools=TOOLS, tool_choice="none")
    (text,) = read(
        ChatCompletion, answer_body(untold, [[replace(done[0], text=CALL)]], HEAD)
    ).choices
    assert (text.finish_reason, text.message.content) == ("stop", CALL)


def test_an_answer_can_be_sent_back_with_what_the_tool_said(roomy: PromptEncoder) -> None:
    """As a caller does it: with all that the client's object holds, null or not."""
    prepared = chat(roomy, tools=TOOLS)
    done = Completion(f"Let me see.\n{CALL}", [1, 2], "stop")
    (choice,) = read(ChatCompletion, answer_body(prepared, [[done]], HEAD)).choices
    called = choice.message.model_dump(mode="json")
    assert called["tool_calls"]
    result = {"role": "tool", "tool_call_id": called["tool_calls"][0]["id"], "content": "sunny"}
    again = chat(roomy, tools=TOOLS, messages=[*TURNS, called, result])
    written = roomy.tokenizer.decode(again.prompts[0])
    assert '"name": "look"' in written
    assert "sunny" in written


def test_an_answer_is_held_to_the_call_that_is_asked_for(
    roomy_llm: LLM, roomy: PromptEncoder
) -> None:
    prepared = chat(
        roomy,
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "wait"}},
        parallel_tool_calls=False,
        max_tokens=200,
    )
    assert prepared.params.constraint is not None
    assert prepared.prompts == (roomy_llm.chat_prompt(TURNS, tools=TOOLS),)
    (choice,) = read(ChatCompletion, answer_body(prepared, run(roomy_llm, prepared), HEAD)).choices
    assert choice.finish_reason == "tool_calls"
    assert [call.function.name for call in choice.message.tool_calls] == ["wait"]


def test_prompts_become_the_tokens_that_the_facade_gives_them(encoder: PromptEncoder) -> None:
    assert chat(encoder).prompts == (encoder.encode_chat(TURNS),)
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    in_parts = chat(encoder, messages=[{"role": "user", "content": parts}])
    assert in_parts.prompts == (encoder.encode_chat([{"role": "user", "content": "Hel\nlo"}]),)
    assert completion(encoder, prompt=["a", [3]]).prompts == (encoder.encode("a"), [3])


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
SEEN = {"role": "user", "content": [IMAGE]}
SYSTEM = {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"messages": [SYSTEM, SEEN]}, "messages[1].content[0]", "image_url"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "needs a text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "needs a text"),
        ({"messages": [{"role": "a b", "content": "a"}]}, "messages[0].role", "a role is a word"),
        ({"messages": [SYSTEM, {"role": "bad", "content": "a"}]}, "messages", "no such role"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]},
            "messages[0].tool_calls[0]",
            "must be an object with",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "surrogate"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages", "over the model's"),
        ({"max_completion_tokens": 600}, "max_completion_tokens", "over the model's limit 512"),
        ({"tools": []}, "tools", "must have 1 to 128"),
        ({"tools": [{"type": "custom"}]}, "tools[0]", '"type": "function"'),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", "1 to 64"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "must be 'auto'"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
            "response_format can't be given beside a tool_choice",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_chat_is_named_by_its_path(
    encoder: PromptEncoder, more: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        chat(encoder, **more)
    assert refusal.value.param == param


def test_of_several_prompts_the_one_that_is_wrong_is_named(encoder: PromptEncoder) -> None:
    for wrong, kind in (("", RequestError), ("x" * 600, CapacityError), ([3] * 512, CapacityError)):
        with pytest.raises(kind) as refusal:
            completion(encoder, prompt=["a", wrong])
        assert refusal.value.param == "prompt[1]"
        with pytest.raises(kind) as refusal:
            completion(encoder, prompt=wrong)
        assert refusal.value.param == "prompt"


def test_a_model_without_a_template_says_so_and_not_where_it_lies(raw_bundle: Path) -> None:
    encoder = PromptEncoder(open_bundle(raw_bundle))
    with pytest.raises(RequestError, match="has no chat template") as refusal:
        chat(encoder)
    assert refusal.value.param == "messages"
    assert str(raw_bundle) not in str(refusal.value)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
JSON = st.recursive(
    LEAVES | st.sampled_from(["user", "tool", "text", "function", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "function", "name", "id"]), inner)
    ),
    max_leaves=6,
)
KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
MESSAGE = st.dictionaries(st.sampled_from(KEYS), JSON) | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": JSON},
    optional={"tool_calls": JSON, "name": JSON},
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MESSAGE, max_size=2), JSON, JSON)
def test_any_messages_and_tools_are_encoded_or_refused(
    encoder: PromptEncoder, messages: Any, tools: Any, choice: Any
) -> None:
    for more in ({"tools": tools}, {"tools": TOOLS, "tool_choice": choice}, {}):
        try:
            assert chat(encoder, messages=messages, **more).prompts[0]
        except RequestError as error:
            root = error.param.partition("[")[0].partition(".")[0]
            assert root in ("messages", "tools", "tool_choice")


RULE: dict[str, Any] = {"not": {}}  # no grammar can keep it


def test_what_only_the_engine_finds_is_said_of_the_body_too(
    roomy_llm: LLM, roomy: PromptEncoder
) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": RULE}}
    tool = {"name": "b", "parameters": {"type": "object", "properties": {"x": RULE}}}
    called = {"tools": [*TOOLS, {"type": "function", "function": tool}], "tool_choice": "required"}
    for prepared, param, words in (
        (chat(roomy, response_format=schema), "response_format.json_schema.schema", "Unimpl"),
        (chat(roomy, **called), "tools", "the tool 'b' can't be enforced"),
        (chat(roomy, max_completion_tokens=2040), "max_completion_tokens", "over max_len 2048"),
        (completion(roomy, prompt=["a", [999]]), "prompt[1]", "token ids must lie in"),
        (completion(roomy, logit_bias={"999": 1}), "logit_bias", "token ids must lie in"),
    ):
        with pytest.raises(RequestError, match=words) as refusal:
            answer_body(prepared, run(roomy_llm, prepared), HEAD)
        assert refusal.value.param == param


def test_a_completion_that_did_not_end_well_is_no_answer(encoder: PromptEncoder) -> None:
    failure = BackendError("it failed")
    failed = Completion("", [], "error", error=failure)
    for prepared in (chat(encoder), completion(encoder)):
        with pytest.raises(BackendError) as refusal:
            answer_body(prepared, [[failed]], HEAD)
        assert refusal.value is failure
        with pytest.raises(CaravanError, match="given up"):
            answer_body(prepared, [[Completion("a", [1], "abort")]], HEAD)
