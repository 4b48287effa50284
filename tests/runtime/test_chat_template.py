"""Chat templates give the same bytes as in ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from llama_decoder.gguf_file import GgufWeights
from llama_runtime.chat_template import ChatTemplate
from llama_runtime.errors import RequestError
from tests.runtime.chat_templates import (
    LLAMA_2,
    LLAMA_3,
    LLAMA_3_1,
    LLAMA_3_2,
    SPECIAL_TOKENS,
    TEMPLATES,
    TINYLLAMA,
)

Message = dict[str, Any]

# Python counts U+001C to U+001F as white space and minijinja doesn't, as the module says.
CONTENT = st.text(
    st.one_of(
        st.sampled_from(" \n\r\t\v\f\x85\xa0\u2028\u3000\u200b\ufeff<>&'\"{}%\\é🎉"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\x1c\x1d\x1e\x1f"),
    ),
    max_size=12,
)
TOOLS = [{"type": "function", "function": {"name": "wetter", "description": "<b>é</b> 'x' \"y\""}}]


def turns(*contents: str, system: str | None = None) -> list[Message]:
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(contents)]
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def same_as_transformers(
    source: str,
    messages: list[Message],
    *,
    add_generation_prompt: bool = True,
    tools: list[Message] | None = None,
) -> str:
    template = ChatTemplate(source, SPECIAL_TOKENS)
    prompt = template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    (expected,), _ = render_jinja_template(
        conversations=[messages],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        **SPECIAL_TOKENS,
    )
    assert prompt == expected
    return prompt


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "messages",
    [
        turns("Hello"),
        turns("Hello", system="You are brief."),
        turns("Hello", "Hi!", "How are you?", "Fine.", "Good."),
        turns("a", "b", "c", system=""),
        turns("", "", " "),
        turns("  spaces \n\n", "\tb\r\n", "\nc\n", system=" \n s \n "),
        turns("<|eot_id|></s>{{ messages }}{% raw %}", "日本語 🎉 \u200d", "\\n 'x' \"y\" <&>"),
    ],
)
def test_prompts_equal_those_of_transformers(
    name: str, messages: list[Message], add_generation_prompt: bool
) -> None:
    source = TEMPLATES[name]
    prompt = same_as_transformers(source, messages, add_generation_prompt=add_generation_prompt)
    assert all(message["content"].strip() in prompt for message in messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_text_is_written_as_transformers_writes_it(name: str) -> None:
    @settings(deadline=None)
    @given(st.lists(CONTENT, min_size=1, max_size=4), st.none() | CONTENT)
    def check(contents: list[str], system: str | None) -> None:
        same_as_transformers(TEMPLATES[name], turns(*contents, system=system))

    check()


def test_the_real_template_equals_transformers(real_gguf: Path) -> None:
    source = GgufWeights(real_gguf).metadata["tokenizer.chat_template"]
    assert isinstance(source, str)
    assert "<|im_start|>assistant" in same_as_transformers(source, turns("Hello"))
    same_as_transformers(source, turns("a", "b", "c", system="s"), add_generation_prompt=False)
    same_as_transformers(source, turns("  a \r\n", "\n", "c\t"))


def test_tools_and_what_is_called_are_written_as_transformers_writes_them() -> None:
    arguments = {"ort": "Köln <b>", "tage": 3, "genau": True, "nichts": None, "liste": [1.5, "x"]}
    messages = [
        *turns("Wetter?", system="s"),
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "wetter", "arguments": arguments}}],
        },
        {"role": "tool", "content": '{"grad": 3}'},
    ]
    prompt = same_as_transformers(LLAMA_3_2, messages, tools=TOOLS)
    assert "<b>é</b>" in prompt
    assert "Köln <b>" in prompt


@pytest.mark.parametrize(
    "expression",
    [
        "messages|tojson",
        "messages|tojson(indent=2)",
        "messages|tojson(sort_keys=true, separators=(',', ':'))",
        "messages|tojson(ensure_ascii=true)",
        "documents is none and tools is none",
        "undefined_thing is defined",
        "undefined_thing|default('x')",
        "(messages|map(attribute='role')|join(','))~(messages|length)~none~true",
        "(messages|selectattr('role', 'equalto', 'user')|list|last)['content'][::-1]",
        "messages[0].content.split('l')[-1].upper().startswith('O')",
        "messages[-1]['content'].lstrip('H').replace('e', 'E').rstrip()",
        "'a' if 'hello' in messages[0].content|lower else 'b'",
        "namespace(a=1).a + 7 // 2 + 7 % 4",
        "messages[0].items()|list|string",
        "messages[0].keys()|list|string",
        "messages[0].values()|list|string",
        "messages[0].get('name', 'nobody') ~ messages[1].get('role')",
        "messages|string ~ messages[0]|string ~ messages[:2]|string",
        "messages[0] is mapping and messages is iterable and messages is sequence",
        "(messages[0] == messages[1]) ~ (messages == messages) ~ (messages != [])",
        "(messages and messages[0]) is false or not messages",
        "{'all': messages, 'first': [messages[0]]}|tojson",
    ],
)
def test_expressions_of_published_templates_mean_the_same(expression: str) -> None:
    same_as_transformers("{{ " + expression + " }}", turns("Hello", "Hi <é>'", "Hello!"))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "a\n  {% generation %}\n b {{ messages[0].content }}\n  {%- endgeneration %}\n c",
        "{%- generation -%} a {%- endgeneration -%} b",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}"
        "{{ m.content }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    ],
)
def test_tags_of_transformers_mean_the_same(source: str) -> None:
    same_as_transformers(source, turns("Hello", "Hi", "Why?", "Because"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_long_conversations_fit_in_the_fuel(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS)
    long = "A long text. " * 200_000
    assert len(template.render(turns(long))) >= len(long) - 1
    many = template.render(turns(*["Hello"] * 5_001))
    assert many.count("Hello") == 5_001


def test_parts_of_a_text_are_its_lines() -> None:
    template = ChatTemplate(LLAMA_3, SPECIAL_TOKENS)
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    whole = template.render([{"role": "user", "content": "a \nb"}])
    assert template.render([{"role": "user", "content": parts}]) == whole


def test_what_is_none_counts_as_missing() -> None:
    call = {"function": {"name": "wetter", "arguments": {}}}
    bare = {"role": "assistant", "tool_calls": [call]}
    messages = [*turns("Wetter?"), bare, {"role": "tool", "content": "grau"}]
    nones = [{**one, "name": None, "content": one.get("content")} for one in messages]
    assert nones[1]["content"] is None
    nones[0]["tool_calls"] = None
    template = ChatTemplate(LLAMA_3_2, SPECIAL_TOKENS)
    assert template.render(nones) == same_as_transformers(LLAMA_3_2, messages)


@pytest.mark.parametrize(
    ("source", "message", "words"),
    [
        (TINYLLAMA, {"role": "critic", "content": "b"}, r"messages\[1\] has the role 'critic'"),
        (TINYLLAMA, {"role": "tool", "content": ""}, r"messages\[1\] has the role 'tool'"),
        (
            LLAMA_3,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            r"messages\[1\] has the tool call 0",
        ),
        (
            "{{ messages[0].content }}",
            {"role": "system", "content": "a"},
            r"messages\[1\] has the role 'system'",
        ),
        (
            LLAMA_2.replace("raise_exception", "''|format"),
            {"role": "critic", "content": "[INST]"},
            r"messages\[1\] has the role 'critic'",
        ),
    ],
)
def test_nothing_is_left_out_without_a_word(source: str, message: Message, words: str) -> None:
    template = ChatTemplate(source, SPECIAL_TOKENS)
    with pytest.raises(RequestError, match=f"{words}, which the chat template leaves out") as error:
        template.render([*turns("a"), message])
    assert error.value.param == "messages"


def test_tools_that_the_template_leaves_out_are_named() -> None:
    with pytest.raises(RequestError, match=r"there is tools\[0\], which the chat") as error:
        ChatTemplate(LLAMA_3, SPECIAL_TOKENS).render(turns("a"), tools=TOOLS)
    assert error.value.param == "tools"
    assert "wetter" in ChatTemplate(LLAMA_3_1, SPECIAL_TOKENS).render(turns("a"), tools=TOOLS)


def test_roles_that_the_template_writes_are_no_error() -> None:
    messages = [*turns("a"), {"role": "critic", "content": "a"}, *turns("b", system="c")]
    same_as_transformers(LLAMA_3, messages)
