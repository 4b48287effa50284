"""Bad messages and bad templates are one clear error, and harmful templates do no harm."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llama_runtime import limited_process, template_process
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


@pytest.mark.alone
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


GROWING = (
    "{% set n = namespace(x=['aaaaaaaa'], y=['aaaaaaaa']) %}{% for i in range(26) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ USE }}"
)
DEEP = "{% set n = namespace(x=[]) %}{% for i in range(30000) %}{% set n.x = [n.x] %}{% endfor %}"


@pytest.mark.alone
@pytest.mark.parametrize(
    "source",
    [
        *(
            GROWING.replace("USE", use)
            for use in (
                "n.x|tojson",
                "n.x == n.y",
                "[n.x, n.y]|sort",
                "raise_exception(n.x)",
            )
        ),
        "{{ '{:>1000000000}'.format('x') }}",
        "{{ '{:.1000000000f}'.format(1.0) }}",
        "{{ [[1]]|tojson(indent=1000000000) }}",
        DEEP + "{{ n.x|tojson }}",
        "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}{{ n.x|length }}",
    ],
)
def test_a_bomb_that_costs_no_fuel_ends_its_own_process(source: str) -> None:
    """These cost seconds, gigabytes or a crash where templates are rendered in-process."""
    template = ChatTemplate(source, {})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    with pytest.raises(RequestError, match=r"more than 0\.5 s or 160 MB: shorten the messages"):
        template.render(USER)
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # kilobytes
    assert ChatTemplate(PLAIN, {}).render(USER) == "user: a"


@pytest.mark.parametrize(
    "source", ["{{ " + "-" * 100_000 + "1 }}", "{{ 1" + "+1" * 100_000 + " }}", "x" * 300_000]
)
def test_a_source_that_breaks_the_compiler_is_a_bundle_error(source: str) -> None:
    with pytest.raises(BundleError, match="the chat template "):
        ChatTemplate(source, {})
    assert ChatTemplate(PLAIN, {}).render(USER) == "user: a"


def test_ctrl_c_while_a_template_is_rendered_leaves_no_answer_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = ChatTemplate(PLAIN, {})

    def interrupted(_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(limited_process, "_read_frame", interrupted)
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "first"}])
    assert template.render([{"role": "user", "content": "second"}]) == "user: second"


def test_a_renderer_that_was_killed_is_started_again() -> None:
    template = ChatTemplate(PLAIN, {})
    process = template_process._renderer._process
    assert process is not None
    process.kill()
    process.wait()
    assert template.render(USER) == "user: a"


def test_the_renderer_takes_no_signal_of_the_terminal_and_ends_with_its_program(
    tmp_path: Path,
) -> None:
    code = (
        "import os\nfrom llama_runtime import template_process\n"
        "from llama_runtime.chat_template import ChatTemplate\n"
        "ChatTemplate('a', {})\npid = template_process._renderer._process.pid\n"
        "print(pid, os.getpgid(pid) != os.getpgrp(), flush=True)\nos._exit(0)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    pid, apart = run.stdout.split()
    assert (apart, run.stderr) == ("True", "")
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < end, "the renderer has outlived its program"
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_renders_with_a_process_of_its_own() -> None:
    template = ChatTemplate(PLAIN, {})
    child = os.fork()
    if child == 0:
        os._exit(0 if template.render(USER) == "user: a" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert template.render(USER) == "user: a"


def test_without_an_interpreter_templates_are_rendered_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a program that embeds Python; what it would start is the program itself."""
    limited_process.can_start.cache_clear()
    monkeypatch.setattr(sys, "executable", "/usr/bin/some-server")
    try:
        for _ in range(2):
            assert ChatTemplate(PLAIN, {}).render(USER) == "user: a"
    finally:
        limited_process.can_start.cache_clear()
    assert caplog.text.count("without limits") == 1


def test_a_long_conversation_is_rendered() -> None:
    messages = [{"role": "user", "content": f"message {i}"} for i in range(5_000)]
    text = ChatTemplate(PLAIN, {}).render([*messages, {"role": "user", "content": "x" * 3_000_000}])
    assert text.endswith("x" * 1000)


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
        ([{"role": "user", "content": None}], "'content'; it is missing"),
        ([{"role": "user", "content": 3}], "'content'; it is int"),
        ([{"role": "user", "content": []}], "'content'; it is an empty list"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\], part 0 must have a"),
        ([{"role": "user", "content": ["a"]}], r"part 0 is of the type 'a'; only 'text'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            r"messages\[0\], part 1 is of the type 'image_url'; only 'text' can be read",
        ),
        ([{"role": "assistant", "tool_calls": []}], "'content'; it is missing"),
        ([{"role": "a b", "content": ""}], "has the role 'a b'; a role is a word"),
        ([{"role": "user\n", "content": ""}], r"has the role 'user\\n'; a role is a word"),
        ([{"role": "", "content": ""}], "has the role ''; a role is a word"),
        ([{"role": "a" * 65, "content": ""}], "a role is a word of at most 64 letters"),
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
