"""Chat templates give the same bytes as in ``transformers``.

The templates follow the prompt formats that the models' cards publish, with the constructs that
their own templates use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from llama_decoder.gguf_file import GgufWeights
from llama_runtime.chat_template import ChatTemplate

Message = dict[str, Any]

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set turns = messages %}"
    "{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set text = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
LLAMA_3_2 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"]|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{#- Tools that the model may call are listed for it. #}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == "ipython" or message.role == "tool" or "tool_calls" in message) %}
        {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
        {{- message["content"] | trim + "<|eot_id|>" }}
    {%- elif "tool_calls" in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {{- '{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {%- for name, value in call.arguments.items() %}
            {{- name + "=" + value|string }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- endif %}
        {%- endfor %}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
TINYLLAMA = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
TEMPLATES = {
    "SmolLM2": SMOLLM2,
    "Llama 2": LLAMA_2,
    "Llama 3": LLAMA_3,
    "Llama 3.2": LLAMA_3_2,
    "TinyLlama": TINYLLAMA,
    "TinyLlama indented": TINYLLAMA.replace("\n{%", "\n  {%"),
    "TinyLlama with Windows line endings": TINYLLAMA.replace("\n", "\r\n"),
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

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


@pytest.mark.parametrize("name", TEMPLATES)
def test_long_conversations_fit_in_the_fuel(name: str) -> None:
    template = ChatTemplate(TEMPLATES[name], SPECIAL_TOKENS)
    long = "A long text. " * 200_000
    assert len(template.render(turns(long))) >= len(long) - 1
    many = template.render(turns(*["Hello"] * 5_001))
    assert many.count("Hello") == 5_001
