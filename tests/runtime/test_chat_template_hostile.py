"""Bad messages and bad templates are one clear error, and harmful templates do no harm."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from llama_runtime.chat_template import ChatTemplate
from llama_runtime.errors import BundleError, RequestError

PLAIN = "{% for message in messages %}{{ message.role }}: {{ message.content|trim }}{% endfor %}"
ALTERNATING = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
)
USER = [{"role": "user", "content": "a"}]


def test_special_tokens_never_replace_the_conversation() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ x }}", {"messages": "no", "x": "yes"})
    assert template.render(USER) == "ayes"


def test_what_the_template_says_reaches_the_caller() -> None:
    with pytest.raises(RequestError, match="refuses these messages: Roles must alternate") as error:
        ChatTemplate(ALTERNATING, {}).render(USER * 2)
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "expression",
    [
        "1 + 'a'",
        "missing.attribute",
        "messages|nonsense",
        "messages.nothing()",
        "messages.index(3)",
        "raise_exception()",
        "strftime_now(3)",
        "messages|tojson(indent={})",
        "messages|tojson(3, 4, 5, 6, 7)",
    ],
)
def test_a_template_that_fails_is_a_request_error(expression: str) -> None:
    template = ChatTemplate("{{ " + expression + " }}", {})
    with pytest.raises(RequestError, match="can't render these messages: ") as error:
        template.render(USER)
    assert error.value.param == "messages"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages", "{% for x in y %}", "{% nonsense %}"]
)
def test_a_template_that_does_not_compile_is_a_bundle_error(source: str) -> None:
    with pytest.raises(BundleError, match="chat template doesn't compile: syntax error"):
        ChatTemplate(source, {})


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}{{ n.x }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', 'aaa')"
        " %}{% endfor %}{{ n.x }}",
        "{% set x = 'a' * 100000 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{{ 'a' * 100000000 }}",
    ],
)
def test_a_template_bomb_is_stopped(source: str) -> None:
    template = ChatTemplate(source, {})
    start = time.perf_counter()
    with pytest.raises(RequestError, match="more than 500000 steps"):
        template.render(USER)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ("Hello", "must be a list of turns, not str"),
        ({"role": "user", "content": "a"}, "must be a list of turns, not dict"),
        (None, "must be a list of turns, not NoneType"),
        (["Hello"], r"messages\[0\] must be an object with 'role' and 'content', not str"),
        ([{"role": "user"}], r"messages\[0\] needs a text as 'content'; it is missing"),
        ([*USER, {"content": "a"}], r"messages\[1\] needs a text as 'role'; it is missing"),
        ([{"role": 1, "content": "a"}], "'role'; it is int"),
        ([{"role": "user", "content": None}], "'content'; it is NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'content'; it is list"),
        ([{"role": "user", "content": "a\ud800"}], r"lone surrogate, U\+D800"),
        ([{"role": "user", "content": "", "x": {"y": ["\udfff"]}}], r"lone surrogate, U\+DFFF"),
        ([{"role": "user", "content": "", "x": b""}], "JSON values only: .*bytes"),
        ([{"role": "user", "content": "", "x": float("nan")}], "JSON values only"),
        ([{"role": "user", "content": "", (1, 2): 3}], "JSON values only"),
    ],
)
def test_malformed_messages_are_named(messages: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as error:
        ChatTemplate(PLAIN, {}).render(messages)
    assert error.value.param == "messages"
    assert "\n" not in str(error.value)


def test_values_that_nest_without_end_are_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    circle: list[Any] = []
    circle.append(circle)
    for value in (deep, circle):
        with pytest.raises(RequestError, match="JSON values only"):
            ChatTemplate(PLAIN, {}).render([{"role": "user", "content": "", "x": value}])
    with pytest.raises(RequestError, match="tools must hold JSON values only") as error:
        ChatTemplate(PLAIN, {}).render(USER, tools=[{"x": object()}])
    assert error.value.param == "tools"


def test_a_template_reaches_nothing_of_python() -> None:
    source = "{{ messages.__class__ }}{{ ''.__class__ }}{{ raise_exception.__globals__ }}"
    assert ChatTemplate(source, {}).render(USER) == ""


@pytest.mark.parametrize(
    "change",
    [
        "messages.extend(messages)",
        "messages.append(messages)",
        "messages.copy().extend(messages)",
        "messages.sort()",
        "messages[0].update(role='x')",
        "messages[0].pop('role')",
        "messages[0].fromkeys(range(100000))",
        "messages[0].items().mapping.copy()",
        "messages._values.append(1)",
    ],
)
def test_a_template_cannot_change_what_it_is_given(change: str) -> None:
    """A list that doubles itself 60 times would fill the memory at the price of 60 calls."""
    template = ChatTemplate("{% for i in range(60) %}{{ " + change + " }}{% endfor %}", {})
    messages = USER
    with pytest.raises(RequestError, match="can't render these messages"):
        template.render(messages)
    assert messages == USER


def test_a_template_can_be_rendered_by_several_threads() -> None:
    template = ChatTemplate(PLAIN, {})
    results: dict[int, bool] = {}

    def render(number: int) -> None:
        messages = [{"role": "user", "content": f"I am {number}"}]
        expected = template.render(messages)
        results[number] = all(template.render(messages) == expected for _ in range(200))

    threads = [threading.Thread(target=render, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(4), True)
