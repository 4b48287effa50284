"""The programs of examples/ run, and show what they say they show.

``ray_serve_app.py`` needs a cluster, and has a test of its own: ``tests/e2e/test_ray_serve.py``.
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

EXAMPLES = ROOT / "examples"
Show = Callable[..., str]
SHORT = [path.stem for path in EXAMPLES.glob("*.py") if path.stem != "ray_serve_app"]


@pytest.fixture
def show(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """Runs an example as its first lines say, in this process; what it printed."""

    def show(name: str, *args: str, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [name, *args])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize("name", SHORT)
def test_each_is_short_and_says_how_it_is_started(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 80
    assert any(line.startswith(f"    python examples/{name}.py") for line in lines[:6])


def test_the_quickstart_lists_all_of_them() -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\]\(\.\./examples/\1\.py\)", page, re.MULTILINE)
    assert sorted(listed) == sorted([*SHORT, "ray_serve_app"])


def test_simple_makes_its_own_bundle_and_company_changes_nothing(show: Show) -> None:
    printed = show("simple")
    assert "built and verified" in printed
    assert "same tokens: [True, True, True]" in printed


def test_basic_batch_answers_each_question(show: Show) -> None:
    printed = show("basic_batch", "bundle")
    assert len(re.findall(r"\[\d+ tokens, (?:stop|length)\]", printed)) == 4
    assert re.search(r"Is water wet\?.*\n    (?:yes|no)\n", printed)


def test_throughput_gives_the_same_completions_both_ways(show: Show) -> None:
    printed = show("throughput", "bundle")
    assert "one by one" in printed
    assert "10 of 10 completions are the same" in printed


def test_variable_lengths_shows_each_as_it_ends(show: Show) -> None:
    rows = re.findall(r"s  \[ ?(\d+)\] +(\d+) \+ +(\d+)  (\.+#+)\n", show("variable_lengths"))
    order = [int(index) for index, *_ in rows]
    assert sorted(order) == list(range(12))
    assert order != sorted(order), "short ones overtake"


def test_stress_accounts_for_every_request(show: Show) -> None:
    printed = show("stress", "bundle", "60")
    assert "60 of 60 accounted for: {'error': 2, " in printed


def test_streaming_batch_takes_turns_and_shows_the_whole(show: Show) -> None:
    printed = show("streaming_batch", "bundle")
    turns = re.findall(r"(?:^| )([012]):['\"]", printed.partition("\n\n")[0])
    assert len(turns) == 60
    assert sum(a != b for a, b in pairwise(turns)) > 2, "one after the other"
    assert printed.count("first token") == 3


def test_chat_loop_answers_each_line_and_ends_with_the_input(show: Show) -> None:
    printed = show("chat_loop", "bundle", stdin="Hello\nAnd you?\n")
    assert len(re.findall(r"\[prompt of \d+ tokens; \d+ spared in all so far\]", printed)) == 2


def test_a_bundle_that_is_not_there_is_one_sentence(show: Show) -> None:
    for name in set(SHORT) - {"simple"}:
        with pytest.raises(SystemExit, match=r"error: the bundle .* does not exist"):
            show(name, "nowhere")


def test_async_service_answers_who_overlap_and_ends_in_peace(desk: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, os.fspath(EXAMPLES / "async_service.py"), "bundle", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        try:
            port = int(process.stdout.readline().rpartition(":")[2])
            answers = asyncio.run(ask(port))
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert len(answers) == 3
    for answer in answers:
        assert answer.endswith(b"\n")
        assert not answer.startswith(b"error")


async def ask(port: int) -> list[bytes]:
    async def one(number: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"Question %d\n" % number)
        answer = await reader.read()
        writer.close()
        return answer

    return await asyncio.gather(*(one(number) for number in range(3)))
