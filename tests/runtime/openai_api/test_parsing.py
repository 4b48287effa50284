"""What a body asks for: each field has an effect, or none on purpose, or is refused by its name.

The names of the fields are those of the ``openai`` package: one that a newer version adds fails
here until somebody decides about it.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types import completion_create_params as completion_types
from openai.types.chat import completion_create_params as chat_types

from llama_runtime.errors import RequestError
from llama_runtime.openai_api import ApiRequest, parse_chat, parse_completion
from llama_runtime.openai_api.parsing import UNSUPPORTED_CHAT, WITHOUT_EFFECT
from llama_runtime.params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.7, top_k=40, max_tokens=99)
TURNS = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
NAMED = {"type": "function", "function": {"name": "look"}}
CHAT: dict[str, Any] = {"model": "m", "messages": TURNS}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hello"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}

# A value of each field that has an effect, and what it becomes.
BOTH: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("other", {"model": "other"}),
    "temperature": (0.3, {"temperature": 0.3}),
    "top_p": (0.5, {"top_p": 0.5}),
    "n": (3, {"n": 3}),
    "stop": ("end", {"stop": ("end",)}),
    "seed": (7, {"seed": 7}),
    "presence_penalty": (0.5, {"presence_penalty": 0.5}),
    "frequency_penalty": (-0.5, {"frequency_penalty": -0.5}),
    "logit_bias": ({"5": 2, "17": -100}, {"logit_bias": {5: 2, 17: -100}}),
    "stream": (True, {"stream": True}),
    # what vLLM takes beside OpenAI's
    "top_k": (5, {"top_k": 5}),
    "min_p": (0.1, {"min_p": 0.1}),
    "repetition_penalty": (1.2, {"repetition_penalty": 1.2}),
    "min_tokens": (2, {"min_tokens": 2}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "stop_token_ids": ([3, 4], {"stop_token_ids": frozenset({3, 4})}),
    "include_stop_str_in_output": (True, {"include_stop": True}),
    "priority": (-2, {"priority": -2}),
    "cache_salt": ("tenant", {"cache_salt": "tenant"}),
    "structured_outputs": ({"regex": "a+"}, {"regex": "a+"}),
}
OF_CHAT: dict[str, tuple[Any, dict[str, Any]]] = {
    "messages": (
        [{"role": "user", "content": "Bye"}],
        {"messages": ({"role": "user", "content": "Bye"},)},
    ),
    "max_tokens": (8, {"max_tokens": 8}),
    "max_completion_tokens": (8, {"max_tokens": 8}),
    "logprobs": (True, {"logprobs": True}),
    "response_format": (AS_SCHEMA, {"json_schema": json.dumps(SCHEMA, separators=(",", ":"))}),
    "tools": (TOOLS, {"tools": TOOLS}),
    "tool_choice": ("none", {"tool_choice": "none"}),
}
OF_COMPLETION: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": ("Bye", {"prompts": ("Bye",)}),
    "max_tokens": (8, {"max_tokens": 8}),
    "logprobs": (3, {"logprobs": True, "top_logprobs": 3}),
    "echo": (True, {"echo": True}),
}
# Fields that need another one beside them: the other one, a value, and what it becomes.
BESIDE_CHAT = {
    "top_logprobs": ({"logprobs": True}, 4, {"top_logprobs": 4}),
    "stream_options": ({"stream": True}, {"include_usage": True}, {"include_usage": True}),
}
BESIDE_COMPLETION = {
    "stream_options": ({"stream": True}, {"include_usage": True}, {"include_usage": True}),
}
# The only values that can be honoured, which say what happens anyway; and others, which can't.
FIXED = {
    "user": (["somebody"], []),
    "metadata": ([{"a": "b"}], []),
    "store": ([False], [True, 0]),
    "service_tier": (["auto"], ["flex", "default"]),
}
FIXED_CHAT = {
    "parallel_tool_calls": ([True], []),
    "modalities": ([["text"]], [["text", "audio"], "text"]),
}
FIXED_COMPLETION = {"best_of": ([1], [2, True]), "suffix": ([], ["", "end"])}


def chat(**more: Any) -> ApiRequest:
    return parse_chat({**CHAT, **more}, DEFAULTS)


def completion(**more: Any) -> ApiRequest:
    return parse_completion({**COMPLETION, **more}, DEFAULTS)


def seen(request: ApiRequest) -> dict[str, Any]:
    """All that it asks for, by name."""
    names = [one.name for one in fields(request) if one.name not in ("params", "paths")]
    asked = {name: getattr(request, name) for name in names}
    return asked | {one.name: getattr(request.params, one.name) for one in fields(SamplingParams)}


def cases(*tables: dict[str, tuple[Any, dict[str, Any]]]) -> list[Any]:
    return [pytest.param(k, *v, id=k) for table in tables for k, v in table.items()]


@pytest.mark.parametrize(("name", "value", "becomes"), cases(BOTH, OF_CHAT))
def test_a_field_of_a_chat_does_what_it_says_and_no_more(
    name: str, value: Any, becomes: dict[str, Any]
) -> None:
    assert seen(chat(**{name: value})) == seen(chat()) | becomes
    assert seen(chat()) | becomes != seen(chat())


@pytest.mark.parametrize(("name", "value", "becomes"), cases(BOTH, OF_COMPLETION))
def test_a_field_of_a_completion_does_what_it_says_and_no_more(
    name: str, value: Any, becomes: dict[str, Any]
) -> None:
    assert seen(completion(**{name: value})) == seen(completion()) | becomes
    assert seen(completion()) | becomes != seen(completion())


@pytest.mark.parametrize(
    ("parse", "name", "beside", "value", "becomes"),
    [(chat, k, *v) for k, v in BESIDE_CHAT.items()]
    + [(completion, k, *v) for k, v in BESIDE_COMPLETION.items()],
)
def test_a_field_that_needs_another_is_refused_without(
    parse: Any, name: str, beside: dict[str, Any], value: Any, becomes: dict[str, Any]
) -> None:
    assert seen(parse(**beside, **{name: value})) == seen(parse(**beside)) | becomes
    with pytest.raises(RequestError, match=f"^{name} needs ") as refusal:
        parse(**{name: value})
    assert refusal.value.param == name


@pytest.mark.parametrize(
    ("parse", "name", "good", "bad"),
    [(chat, k, *v) for k, v in (FIXED | FIXED_CHAT).items()]
    + [(completion, k, *v) for k, v in (FIXED | FIXED_COMPLETION).items()],
)
def test_a_field_that_changes_nothing_takes_only_what_is_true_anyway(
    parse: Any, name: str, good: list[Any], bad: list[Any]
) -> None:
    for value in good:
        assert seen(parse(**{name: value})) == seen(parse())
    for value in bad:
        with pytest.raises(RequestError, match=f"^{name} can't be ") as refusal:
            parse(**{name: value})
        assert refusal.value.param == name
    for stated in WITHOUT_EFFECT:
        assert stated.partition(":")[0] in FIXED


@pytest.mark.parametrize("name", UNSUPPORTED_CHAT)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    values: list[Any] = ["x", False, {}, []]
    for value in values:
        with pytest.raises(RequestError, match=f"^{name} is not supported: ") as refusal:
            chat(**{name: value})
        assert refusal.value.param == name


def names(*types: Any) -> set[str]:
    return {name for one in types for name in one.__annotations__}


def test_there_is_a_decision_about_every_field_of_openai() -> None:
    ours = {*BOTH, *OF_CHAT, *BESIDE_CHAT, *FIXED, *FIXED_CHAT, *UNSUPPORTED_CHAT}
    theirs = names(
        chat_types.CompletionCreateParamsBase,
        chat_types.CompletionCreateParamsStreaming,
        chat_types.CompletionCreateParamsNonStreaming,
    )
    assert theirs - ours == set()
    assert set(UNSUPPORTED_CHAT) <= theirs
    theirs = names(
        completion_types.CompletionCreateParamsBase,
        completion_types.CompletionCreateParamsStreaming,
        completion_types.CompletionCreateParamsNonStreaming,
    )
    assert theirs - {*BOTH, *OF_COMPLETION, *BESIDE_COMPLETION, *FIXED, *FIXED_COMPLETION} == set()


def test_null_is_the_same_as_nothing_in_every_known_field() -> None:
    known = {*BOTH, *OF_CHAT, *BESIDE_CHAT, *FIXED, *FIXED_CHAT, *UNSUPPORTED_CHAT}
    nothing = dict.fromkeys(known - {"model", "messages"})
    assert seen(chat(**nothing)) == seen(chat())
    known = {*BOTH, *OF_COMPLETION, *BESIDE_COMPLETION, *FIXED, *FIXED_COMPLETION}
    assert seen(completion(**dict.fromkeys(known - {"model", "prompt"}))) == seen(completion())
    with pytest.raises(RequestError, match=r"^colour is unknown: leave it out"):
        chat(colour=None)


def test_where_a_body_is_silent_the_model_speaks_but_for_the_length_of_completions() -> None:
    assert chat().params == DEFAULTS
    assert completion().params == replace(DEFAULTS, max_tokens=16)
    assert chat(top_k=-1).params.top_k == 0, "as vLLM turns it off"
    assert chat(max_tokens=5, max_completion_tokens=5).params.max_tokens == 5


PROMPTS: list[tuple[Any, tuple[Any, ...]]] = [
    ("", ("",)),
    (["a", "b"], ("a", "b")),
    ([1, 2], ((1, 2),)),
    ([[1], [2, 3]], ((1,), (2, 3))),
    (["a", [7]], ("a", (7,))),
]


@pytest.mark.parametrize(("given", "read"), PROMPTS)
def test_prompts_come_in_four_forms(given: Any, read: tuple[Any, ...]) -> None:
    assert completion(prompt=given).prompts == read


def test_log_probabilities_of_an_echo_are_those_of_the_prompt_too() -> None:
    assert completion(echo=True, logprobs=0).params.prompt_logprobs
    assert not completion(echo=False, logprobs=1).params.prompt_logprobs
    assert not completion(echo=True).params.prompt_logprobs
    assert not completion(echo=True).params.logprobs


def test_a_prompt_may_be_scored_without_a_completion() -> None:
    request = completion(echo=True, max_tokens=0, logprobs=1)
    assert (request.generates, request.params.max_tokens) == (False, 1)
    assert completion(echo=True, max_tokens=1).generates


@pytest.mark.parametrize(
    ("outputs", "option", "value"),
    [
        ({"json": SCHEMA}, "json_schema", json.dumps(SCHEMA, separators=(",", ":"))),
        ({"json_object": True}, "json_schema", '{"type":"object"}'),
        ({"regex": "a|b"}, "regex", "a|b"),
        ({"choice": ["yes", "no"]}, "choice", ("yes", "no")),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
def test_structured_outputs_hold_a_completion(
    outputs: dict[str, Any], option: str, value: Any
) -> None:
    assert getattr(completion(structured_outputs=outputs).params, option) == value


def test_formats_hold_an_answer() -> None:
    assert chat(response_format={"type": "json_object"}).params.json_schema == '{"type":"object"}'
    assert chat(response_format={"type": "text"}).params == DEFAULTS
    labelled = {**AS_SCHEMA["json_schema"], "description": "how", "strict": False}  # type: ignore[dict-item]
    assert chat(response_format={**AS_SCHEMA, "json_schema": labelled}) == replace(
        chat(response_format=AS_SCHEMA)
    )


def test_one_call_at_a_time_can_be_had_where_a_grammar_makes_it_so() -> None:
    single = {"tools": TOOLS, "parallel_tool_calls": False}
    assert chat(**single, tool_choice="required").tool_choice == "required"
    assert chat(**single, tool_choice=NAMED).tool_choice == NAMED
    with pytest.raises(RequestError, match="parallel_tool_calls can't be false while the model"):
        chat(**single)


JSON_SCHEMA = "response_format.json_schema"
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "give one of them"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens must lie in 1"),
    ({"temperature": "hot"}, "temperature", "must be a number"),
    ({"n": 0}, "n", "must lie in 1 to 128"),
    ({"n": True}, "n", "whole number"),
    ({"seed": -1}, "seed", "must lie in 0"),
    ({"logprobs": 1}, "logprobs", "must be true or false"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must lie in 0 to 20"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "must map token ids"),
    ({"logit_bias": {"01": 1}}, "logit_bias", "must map token ids"),
    ({"logit_bias": {"1" * 5000: 1}}, "logit_bias", "must map token ids"),
    ({"logit_bias": [1]}, "logit_bias", "must map token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias", "-100 to 100"),
    ({"stop": ["a"] * 17}, "stop", "16 at most"),
    ({"stop": [1]}, "stop", "list of texts"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output", "true or false"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream": True, "stream_options": {"a": 1}}, "stream_options.a", "unknown"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "can't be True",
    ),
    ({"response_format": "json"}, "response_format", "must be a JSON object"),
    ({"response_format": {}}, "response_format.type", "missing"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "text, json_object or"),
    ({"response_format": {"type": "json_schema"}}, JSON_SCHEMA, "missing"),
    ({"response_format": {"type": "text", "a": 1}}, "response_format.a", "unknown"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        f"{JSON_SCHEMA}.schema",
        "missing",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "é", "schema": {}}}},
        f"{JSON_SCHEMA}.name",
        "1 to 64 letters",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"enum": ["x" * 70000]}},
            }
        },
        f"{JSON_SCHEMA}.schema",
        f"{JSON_SCHEMA}.schema has 70,.* bytes",
    ),
    (
        {"response_format": AS_SCHEMA, "structured_outputs": {"json": {}}},
        "structured_outputs.json",
        "beside response_format",
    ),
    (
        {"response_format": AS_SCHEMA, "structured_outputs": {"regex": "a"}},
        "structured_outputs.regex",
        "beside json_schema",
    ),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex", "is empty"),
    (
        {"structured_outputs": {"structural_tag": {}}},
        "structured_outputs.structural_tag",
        "unknown",
    ),
    ({"min_tokens": 100}, "min_tokens", "must lie in 0 to 99"),
    ({"user": 7}, "user", "must be a text"),
    ({"metadata": "x"}, "metadata", "JSON object"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "/v1/completions"),
    ({"guided_json": {}}, "guided_json", "structured_outputs.json"),
    ({"colour\n\ud800": 1}, "'colour\\n\\ud800'", "is unknown"),
    ({"messages": "hi"}, "messages", "list of turns"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": None}, "messages", "missing"),
    ({"messages": ["hi"]}, "messages[0]", "JSON object"),
    ({"messages": [*TURNS, {**TURNS[0], "colour": 1}]}, "messages[1].colour", "unknown"),
    ({"messages": [{**TURNS[0], "audio": {"id": "a"}}]}, "messages[0].audio", "not supported"),
    ({"model": None}, "model", "missing"),
    ({"model": 7}, "model", "must be a text"),
    ({"model": "\ud800"}, "model", "surrogate"),
]


@pytest.mark.parametrize(("more", "param", "words"), WRONG)
def test_what_is_wrong_in_a_chat_is_named(more: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        chat(**more)
    assert refusal.value.param == param
    assert param in str(refusal.value)


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"prompt": None}, "prompt", "missing"),
        ({"prompt": []}, "prompt", "an empty list"),
        ({"prompt": {}}, "prompt", "not dict"),
        ({"prompt": 3}, "prompt", "not int"),
        ({"prompt": [1, "a"]}, "prompt[1]", "must be a token id"),
        ({"prompt": [1, True]}, "prompt[1]", "must be a token id"),
        ({"prompt": ["a", 1]}, "prompt[1]", "a text or a list"),
        ({"prompt": [[1], []]}, "prompt[1]", "has no tokens"),
        ({"prompt": [[1], [1.5]]}, "prompt[1][0]", "must be a token id"),
        ({"prompt": ["a"] * 2049}, "prompt", "2,048 at most"),
        ({"logprobs": 21}, "logprobs", "^logprobs must lie in 0 to 20"),
        ({"logprobs": True}, "logprobs", "^logprobs must be a whole number"),
        ({"max_tokens": 0}, "max_tokens", "with echo only"),
        ({"max_tokens": False, "echo": True}, "max_tokens", "whole number"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens", "over max_tokens 0"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown"),
        ({"best_of": 2, "n": 3}, "best_of", "which is 3"),
        ({"tools": TOOLS}, "tools", "unknown"),
        ({"messages": TURNS}, "messages", "unknown"),
    ],
)
def test_what_is_wrong_in_a_completion_is_named(
    more: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as refusal:
        completion(**more)
    assert refusal.value.param == param
    assert param in str(refusal.value)


@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
@pytest.mark.parametrize("body", [None, [], "x", 7, True])
def test_a_body_is_an_object(parse: Any, body: Any) -> None:
    with pytest.raises(RequestError, match="the body must be a JSON object"):
        parse(body, DEFAULTS)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


TEXTS = st.text(st.characters(), max_size=8) | st.sampled_from(["\ud800", "text", "auto", "\0"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
KNOWN = sorted({*BOTH, *OF_CHAT, *OF_COMPLETION, *BESIDE_CHAT, *FIXED, *FIXED_CHAT, "suffix"})


def refusal_of(parse: Any, body: object) -> RequestError | None:
    try:
        parse(body, DEFAULTS)
    except RequestError as error:
        return error
    return None


@given(st.dictionaries(st.sampled_from(KNOWN) | TEXTS, JSON, max_size=4), st.booleans())
@example({"seed": 10**4000, "metadata": float("nan"), "model": "\ud800"}, True)
def test_any_body_is_read_or_refused(body: dict[str, Any], whole: bool) -> None:
    for base, parse in ((CHAT, parse_chat), (COMPLETION, parse_completion)):
        error = refusal_of(parse, {**base, **body} if whole else body)
        assert error is None or (str(error) and error.param)


@given(st.sampled_from(KNOWN), JSON)
def test_one_wrong_field_is_the_one_that_is_named(name: str, value: Any) -> None:
    for base, parse in ((CHAT, parse_chat), (COMPLETION, parse_completion)):
        error = refusal_of(parse, {**base, name: value})
        assert error is None or re.split(r"[.\[]", error.param)[0] == name


@pytest.mark.parametrize("name", ["messages", "prompt", "metadata", "tools", "response_format"])
def test_what_is_nested_too_deeply_to_be_looked_at_is_refused(name: str) -> None:
    for base, parse in ((CHAT, parse_chat), (COMPLETION, parse_completion)):
        error = refusal_of(parse, {**base, name: nested(900)})
        assert error is not None
        assert (error.param, str(error)[:18]) == ("body", "the body is nested")
