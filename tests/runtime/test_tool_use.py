"""What one request says of tools, from the call of a facade to the completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama_runtime.bundle import open_bundle
from llama_runtime.completion import Completion
from llama_runtime.errors import RequestError
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder

USER: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]


def tool(name: str = "mark", **rules: Any) -> dict[str, Any]:
    parameters = {"type": "object", **(rules or {"properties": {"a": {"const": 1}}})}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture
def encoder(fake_bundle: Path) -> PromptEncoder:
    return PromptEncoder(open_bundle(fake_bundle))


def test_an_answer_that_was_cut_off_calls_nothing(encoder: PromptEncoder) -> None:
    """Whatever it holds by then."""
    use = encoder.tool_use([tool()])
    text = '<tool_call>\n{"name": "mark", "arguments": {"a": 1}}\n</tool_call>'
    for end in range(len(text) + 1):
        cut = Completion(text[:end], [], "length").with_tool_calls(use)
        assert (cut.content, cut.tool_calls) == (text[:end], ())
    whole = Completion(text, [], "stop").with_tool_calls(use)
    assert (whole.content, len(whole.tool_calls)) == (None, 1)


def test_without_tools_a_completion_is_what_it_was(encoder: PromptEncoder) -> None:
    plain = Completion('{"name": "mark", "arguments": {}}', [], "stop")
    assert plain.with_tool_calls(encoder.tool_use()) == plain
    assert plain.with_tool_calls(encoder.tool_use([tool()], "none")) == plain


def test_under_none_the_model_is_not_told(fake_llm: LLM) -> None:
    told = fake_llm.chat_prompt(USER, tools=[tool()])
    untold = fake_llm.chat_prompt(USER, tools=[tool()], tool_choice="none")
    assert untold == fake_llm.chat_prompt(USER)
    assert len(told) > len(untold)


@pytest.mark.parametrize("option", [{"min_tokens": 1}, {"ignore_eos": True}, {"regex": "a"}])
def test_what_fights_with_a_call_is_named_beside_the_choice(
    encoder: PromptEncoder, option: dict[str, Any]
) -> None:
    params = SamplingParams(**option)
    assert encoder.tool_use([tool()]).hold(params) is params
    with pytest.raises(RequestError, match="beside a tool_choice that asks for a call") as refusal:
        encoder.tool_use([tool()], "required").hold(params)
    assert refusal.value.param in option


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "b"}}])
def test_the_tool_that_cannot_be_enforced_is_named(fake_llm: LLM, choice: Any) -> None:
    tools = [tool("a"), tool("b", properties={"x": {"not": {}}}), tool("c")]
    with pytest.raises(
        RequestError, match=r"of the tool 'b' can't be enforced:.*Unimpl"
    ) as refusal:
        fake_llm.chat(USER, tools=tools, tool_choice=choice)
    assert refusal.value.param == "tools"
    assert "tool_call" not in str(refusal.value)


@pytest.mark.parametrize("value", ["no", "false", 1, None])
def test_control_tokens_are_allowed_by_a_truth_only(fake_llm: LLM, value: Any) -> None:
    with pytest.raises(RequestError, match="must be true or false") as refusal:
        fake_llm.chat_prompt(USER, allow_control_tokens=value)
    assert refusal.value.param == "allow_control_tokens"
