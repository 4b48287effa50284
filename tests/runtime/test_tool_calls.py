"""Calls are found in what a model wrote, and nothing that it wrote is lost."""

from __future__ import annotations

import itertools
import json
import time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.tool_calls import ParsedAnswer, ToolCall, new_call_id, parse_tool_calls
from llama_runtime.tools import ToolDialect, check_tools

NAMES = ("weather", "time-2", "5", "name")
TOOLS = check_tools([{"type": "function", "function": {"name": name}} for name in NAMES])
DIALECTS: tuple[ToolDialect, ...] = get_args(ToolDialect)
OSLO = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TIME = '{"name": "time-2", "parameters": {}}'
Calls = list[tuple[str, str]]
ONE = [("weather", '{"city": "Oslo"}')]
BOTH = [*ONE, ("time-2", "{}")]


def parse(text: str, dialect: ToolDialect) -> ParsedAnswer:
    numbers = itertools.count()
    return parse_tool_calls(text, dialect, TOOLS, new_id=lambda: f"call_{next(numbers)}")


def check(text: str, dialect: ToolDialect, calls: Calls, content: str | None = None) -> None:
    read = parse(text, dialect)
    assert [(call.name, call.arguments) for call in read.tool_calls] == calls
    assert [call.id for call in read.tool_calls] == [f"call_{i}" for i in range(len(calls))]
    assert read.content == (content if calls else text)


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        (f"<tool_call>\n{OSLO}\n</tool_call>", ONE, None),
        (f"<tool_call>{OSLO}</tool_call><tool_call>{TIME}</tool_call>", BOTH, None),
        (f"<tool_call>\n{OSLO}\n</tool_call>\n\n<tool_call>\n{TIME}\n</tool_call>\n", BOTH, None),
        (f"<tool_call>[{OSLO},\n {TIME}]</tool_call>", BOTH, None),
        (f"<tool_call>\n{OSLO}\n{TIME}\n</tool_call>", BOTH, None),
        (f"I look.\n<tool_call>\n{OSLO}\n</tool_call>\nDone.", ONE, "I look.\n\nDone."),
        (f"I look.<tool_call>{OSLO}", ONE, "I look."),
        (f"<tool_call>{OSLO}\n<tool_call>{TIME}</tool_call>", BOTH, None),
        (f"<tool_call>{OSLO[:-1]}\n</tool_call>\n<tool_call>\n{TIME}\n</tool_call>", BOTH[1:],
         f"<tool_call>{OSLO[:-1]}\n</tool_call>"),
        (f'{{"a": b <tool_call>{OSLO}</tool_call>}}', ONE, '{"a": b }'),
        (f"<tool_call>\n{OSLO}?\n</tool_call>", [], None),
        ("<tool_call>\nno idea\n</tool_call>", [], None),
        ("<tool_call>", [], None),
    ],
)  # fmt: skip
def test_hermes_calls_stand_between_tags(text: str, calls: Calls, content: str | None) -> None:
    check(text, "hermes", calls, content)


@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        (f"<|python_tag|>{OSLO}", ONE, None),
        (f"<|python_tag|>{OSLO}; {TIME}", BOTH, None),
        (f"I look.\n<|python_tag|> {OSLO}\n<|python_tag|>{TIME}", BOTH, "I look."),
        ('{"type": "function", ' + OSLO[1:], ONE, None),
        ('<|python_tag|>brave_search.call(query="x")', [], None),
        (f"<tool_call>{OSLO}</tool_call>", ONE, "<tool_call></tool_call>"),
    ],
)
def test_llama_calls_follow_a_tag(text: str, calls: Calls, content: str | None) -> None:
    check(text, "llama3_json", calls, content)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("text", "calls", "content"),
    [
        (OSLO, ONE, None),
        (f"\n {OSLO}\n", ONE, None),
        (f"{OSLO}\n\n{TIME}", BOTH, None),
        (f"{OSLO}; {TIME};", BOTH, None),
        (f"{OSLO}{TIME}", BOTH, None),
        (f"[{OSLO}, {TIME}]", BOTH, None),
        (f"I look: {OSLO} and\n{TIME} then.", BOTH, "I look:  and\n then."),
        (f"{{x}} [1] {{'a'}} {OSLO}", ONE, "{x} [1] {'a'}"),
        (f"Use `x` as in `y`: {OSLO}", ONE, "Use `x` as in `y`:"),
        (f'{{"city": "Oslo"}}\n{OSLO}', ONE, '{"city": "Oslo"}'),
        (f'{{"a", {TIME}}}\n{OSLO}', ONE, f'{{"a", {TIME}}}'),
    ],
)
def test_tags_that_are_special_tokens_leave_bare_json(
    dialect: ToolDialect, text: str, calls: Calls, content: str | None
) -> None:
    check(text, dialect, calls, content)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "arguments",
    [
        "{}",
        '{"a": "}{][\\" \\\\", "b": {"c": [{}, []]}}',
        '{"a": "</tool_call><tool_call>{<|python_tag|>"}',
        '{"a": "Köln 🎉 \\u00e9 \\ud800", "a": 1.50, "b": 1e999, "c": -0}',
        '{"n": ' + "9" * 5000 + "}",
        '{ "a"\n:\t[ 1 , null,true ]\r\n}',
        '{"cmd": "echo `date` ```"}',
        json.dumps({"code": '{"name": "weather", "arguments": {}}'}),
    ],
)
def test_arguments_are_handed_over_as_they_were_written(
    dialect: ToolDialect, arguments: str
) -> None:
    for key in ("arguments", "parameters"):
        text = f'{{ "{key}" : {arguments} , "name" : "weather" }}'
        check(text, dialect, [("weather", arguments)])
        check(f"{text}\n{TIME}", dialect, [("weather", arguments), BOTH[1]])
        check(f"[{text}]", dialect, [("weather", arguments)])
    if "\\ud800" not in arguments:
        as_text = json.dumps(arguments)
        check(f'{{"name": "weather", "arguments": {as_text}}}', dialect, [("weather", arguments)])


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        " plain text\n",
        '{"city": "Oslo", "temperature": 3}',
        '[{"name": "Ann", "arguments": {}}, {"name": "Bob", "arguments": {}}]',
        OSLO.replace("weather", "unknown"),
        f'[{OSLO}, {{"name": "unknown", "arguments": {{}}}}]',
        '{"name": "weather"}',
        '{"name": "weather", "arguments": {}, "parameters": {}}',
        '{"name": "weather", "name": "weather", "arguments": {}}',
        '{"name": "weather", "arguments": {}, "note": "mine"}',
        '{"name": "weather", "city": {"name": "Oslo"}}',
        '{"name": "weather", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}",
        '{"name": "weather", "arguments": [1]}',
        '{"name": "weather", "arguments": null}',
        '{"name": "weather", "arguments": "Oslo"}',
        '{"name": "weather", "arguments": "{\\"a\\": \\"\\ud800\\"}"}',
        '{"name": "weather", "arguments": {"a": NaN}}',
        '{"name": "weather", "arguments": {"a": "\n"}}',
        '{"name": 5, "arguments": {}}',
        '{"name": ["weather"], "arguments": {}}',
        '{"type": "object", "name": "name", "parameters": {}}',
        f'{{"example": {OSLO}}}',
        f'{{"steps": [{OSLO}, {TIME}]}}',
        f'{{"steps": [{OSLO}, {TIME}, oops]}}',
        f'{{"steps": [\n{OSLO},\n{TIME},\n{{"na',
        f"[{OSLO}, {OSLO[:-3]}",
        f"[{OSLO}; {OSLO}",
        f"Write `{OSLO}`.",
        f"Write:\n```json\n{OSLO}\n```\n",
        *(OSLO[:cut] for cut in range(len(OSLO))),
    ],
)
def test_whatever_is_no_whole_call_of_a_known_tool_stays_as_it_is(
    dialect: ToolDialect, text: str
) -> None:
    check(text, dialect, [])


PIECES = st.one_of(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "<|python_tag|>", "`", "```", "\n", " ", ";", ","),
            *("{", "}", "[", "]", '"', ":", "\\", "name", '"name"', '"arguments"', '"parameters"'),
            *('"weather"', '"type"', '"function"', OSLO, TIME, OSLO[:-1], "\u2028", "\x00"),
        ]
    ),
    st.text(max_size=3),
)


def letters(text: str, dialect: ToolDialect) -> list[str]:
    """What must not get lost: all but markers, separators and white space, in any order."""
    markers = ("<tool_call>", "</tool_call>") if dialect == "hermes" else ("<|python_tag|>",)
    for marker in markers:
        text = text.replace(marker, "")
    return sorted("".join(text.split()).replace(",", "").replace(";", ""))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_text_is_taken_and_none_is_lost(dialect: ToolDialect) -> None:
    @given(st.lists(PIECES, max_size=12).map("".join))
    def check(text: str) -> None:
        read = parse(text, dialect)
        if not read.tool_calls:
            assert read.content == text
            return
        spelled = {("weather", '{"city": "Oslo"}'): OSLO, ("time-2", "{}"): TIME}
        whole = [(call.name, call.arguments) for call in read.tool_calls]
        if not set(whole) <= spelled.keys():
            return
        written = "".join(spelled[call] for call in whole)
        brackets = text.count("[") - (read.content or "").count("[")  # of lists of calls
        written += "[]" * brackets
        assert letters((read.content or "") + written, dialect) == letters(text, dialect)

    check()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
WRITTEN_CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
    min_size=1,
    max_size=4,
)


@given(WRITTEN_CALLS, st.booleans(), st.sampled_from([None, 0, 2]))
def test_calls_that_templates_write_are_read_back(
    calls: list[tuple[str, dict[str, object]]], ensure_ascii: bool, indent: int | None
) -> None:
    for key, dialect, before, between, after in (
        ("arguments", "hermes", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"),
        ("arguments", "hermes", "<tool_call>[", ", ", "]</tool_call>"),
        ("arguments", "hermes", "\n", "\n\n", "\n"),
        ("parameters", "llama3_json", "<|python_tag|>", "; ", ""),
        ("parameters", "llama3_json", "", "\n", ""),
        ("parameters", "llama3_json", "[", ",", "]"),
    ):
        written = [
            json.dumps({"name": name, key: value}, ensure_ascii=ensure_ascii, indent=indent)
            for name, value in calls
        ]
        read = parse(before + between.join(written) + after, dialect)  # type: ignore[arg-type]
        assert read.content is None
        assert [(call.name, json.loads(call.arguments)) for call in read.tool_calls] == calls


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "unit",
    [
        *('{"', '{"a":', '[{"a":', "[", "<tool_call>{", '<tool_call>{"name":', "`{", '{"x"}'),
        *('<|python_tag|>{"name": "weather", "arguments":{"', '{"\\', OSLO[:-1], OSLO + '{"a" '),
        *('<tool_call>["', '{"a":"<tool_call>"', f"<tool_call>{OSLO}[{{"),
    ],
)
def test_no_text_takes_long(dialect: ToolDialect, unit: str) -> None:
    text = unit * (50_000 // len(unit))
    began = time.process_time()
    parse(text, dialect)
    assert time.process_time() - began < 1


def test_ids_differ() -> None:
    ids = {new_call_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(id) == 29 and id.startswith("call_") for id in ids)
    (call,) = parse_tool_calls(OSLO, "hermes", TOOLS).tool_calls
    assert call.as_dict() == {
        "id": call.id,
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    assert call == ToolCall(call.id, "weather", '{"city": "Oslo"}')
