"""Progress on standard error: one line that fits on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime import progress
from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.report import Status, retried, sampling, summary
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.runners.runner import RowRunner
from llama_runtime.params import SamplingParams
from llama_runtime.progress import Console, duration, fit
from llama_runtime.shared_engine import Stats
from tests.runtime.batch.jobs import OPENAI, PROMPTS


@given(st.lists(st.text("ab", min_size=1, max_size=30), min_size=1), st.integers(0, 60))
def test_a_line_is_never_wider_than_it_may_be_and_keeps_what_matters_most(
    parts: list[str], width: int
) -> None:
    line = fit(parts, width)
    assert len(line) <= width
    assert line.startswith(parts[0][:width])
    assert fit(parts, None) == ", ".join(parts)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (36_061, "10:01:01")]
)
def test_a_duration_reads_as_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Calls:
    """What a status line shows, call by call; the last one stays."""

    def __init__(self, *shown: list[str]) -> None:
        self.count = 0
        self._shown = shown

    def __call__(self) -> list[str]:
        self.count += 1
        return self._shown[min(self.count, len(self._shown)) - 1]

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + 10
        while self.count < count:
            assert time.monotonic() < end, "the status line stands still"
            time.sleep(0.005)


def read_all(screen: int) -> str:
    """What a terminal showed until its other side was closed."""
    data = b""
    with contextlib.suppress(OSError):
        while more := os.read(screen, 4096):
            data += more
    return data.decode()


@pytest.fixture
def terminal() -> Iterator[Callable[[int], tuple[TextIO, int]]]:
    """Opens a terminal of so many columns: its stream, and a descriptor to read what it shows."""
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    opened: list[Callable[[], None]] = []

    def open_terminal(columns: int) -> tuple[TextIO, int]:
        screen, device = pty.openpty()
        fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        stream = open(device, "w", encoding="utf-8")  # noqa: SIM115 - closed by the fixture
        opened.extend([stream.close, lambda: os.close(screen)])
        return stream, screen

    yield open_terminal
    for close in opened:
        close()


@pytest.mark.parametrize("columns", [10, 40, 80])
def test_a_terminal_shows_one_line_that_never_wraps_and_is_gone_in_the_end(
    terminal: Callable[[int], tuple[TextIO, int]], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.01)
    stream, screen = terminal(columns)
    long = ["123456/1000000 rows", "1:23:45 left", "1234 tokens/s", "32 active"]
    calls = Calls(long, long, ["2 rows"])
    with Console(stream).status(calls):
        calls.wait_for(5)
    stream.close()
    shown = read_all(screen)
    assert "\n" not in shown
    drawn = shown.split("\r")
    assert drawn[1] == fit(long, columns - 1)
    assert max(map(len, drawn)) <= columns - 1
    assert drawn[-1] == ""
    assert drawn[-2].isspace(), "the line is erased"
    assert len(drawn[-2]) >= len(drawn[-3].rstrip())
    assert any(line.startswith("2 rows ") for line in drawn), "what was longer is overwritten"


def test_elsewhere_progress_is_whole_lines_and_quiet_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    stream = io.StringIO()
    calls = Calls(["1/2 rows", "3 active"])
    with Console(stream).status(calls):
        calls.wait_for(2)
    lines = stream.getvalue().splitlines(keepends=True)
    assert set(lines) == {"1/2 rows, 3 active\n"}
    silent = io.StringIO()
    console = Console(silent, quiet=True)
    console.say("hello")
    never = Calls(["never"])
    with console.status(never):
        console.say("hello")
    with Console(io.StringIO(), with_status=False).status(never):
        time.sleep(0.05)
    assert never.count == 0
    assert silent.getvalue() == ""


def test_a_closed_standard_error_ends_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)

    class Closed(io.StringIO):
        def write(self, _text: str, /) -> int:
            raise BrokenPipeError

    calls = Calls(["1/2 rows"])
    with Console(Closed()).status(calls):
        calls.wait_for(1)


class Runner:
    """Runs nothing, and has four slots."""

    num_slots = 4

    def __init__(self) -> None:
        self.counters = Stats(running=3)

    def stats(self) -> Stats:
        return self.counters


def test_the_status_of_a_job_has_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    statistics, fake = Statistics(), Runner()
    runner = cast(RowRunner, fake)
    status = Status(statistics, runner, total=40)
    assert status() == ["0/40 rows", "0 tokens/s out", "0 in", "3/4 slots"]
    for _ in range(20):
        now[0] += 1
        fake.counters.completion_tokens += 50
        fake.counters.prompt_tokens += 70
        status()
    statistics.rows, statistics.failed = 10, 2
    assert status() == [
        "10/40 rows",
        "1:00 left",
        "50 tokens/s out",
        "70 in",
        "2 failed",
        "3/4 slots",
    ]
    now[0] += 30
    assert float(status()[2].split()[0]) < 20, "it is a recent rate"
    assert Status(statistics, runner, total=None)()[0] == "10 rows"
    going_on = Status(statistics, runner, total=40)
    now[0] += 10
    assert "left" not in going_on()[1], "rows of earlier runs say nothing of how fast this one is"
    statistics.rows = 20
    assert going_on()[1] == "0:20 left"


def test_the_sampling_in_force_is_named_in_full() -> None:
    assert sampling(SamplingParams()) == "greedy"
    assert sampling(SamplingParams(top_k=5)) == "greedy", "filters mean nothing then"
    full = SamplingParams(temperature=0.7, top_k=40, top_p=0.95, seed=1)
    assert sampling(full) == "temperature 0.7, top_k 40, top_p 0.95, seed 1"


def counted(*outcomes: tuple[int, str | None]) -> Statistics:
    statistics = Statistics()
    for index, error in outcomes:
        statistics.count(Outcome(index, b"", error, 20, 12, ("stop",), 0.5))
    return statistics


def test_the_summary_counts_everything() -> None:
    ledger = Ledger(PROMPTS, Path("out.jsonl"))
    statistics = counted((0, None), (3, "the prompt is empty"), (1, None), (2, None), (4, None))
    text = (
        "1 failed, in 2.0 s: 100 prompt and 60 completion tokens, {} tokens/s; results in out.jsonl"
        "\nthe first failure, row 3: the prompt is empty"
    )
    assert summary(statistics, (0, 0), 2.0, ledger) == "5 rows, " + text.format("30.0")
    assert summary(statistics, (4, 50), 2.0, ledger) == (
        "5 rows (1 of them now), " + text.format("5.0")
    )
    apart = Ledger(OPENAI, Path("out.jsonl"), Path("out.errors.jsonl"))
    assert "results in out.jsonl, errors in out.errors.jsonl\n" in (
        summary(statistics, (0, 0), 2.0, apart)
    )
    assert summary(counted((0, None)), (0, 0), 2.0, apart).startswith("1 row, 0 failed, in 2.0 s")
    assert "errors in" not in summary(counted((0, None)), (0, 0), 2.0, apart)


def test_rows_that_ran_again_are_counted_by_themselves() -> None:
    ledger = Ledger(PROMPTS, Path("out.jsonl"))
    assert retried(counted((3, None), (9, "no")), ledger) == (
        "1 of 2 went well this time; results in out.jsonl\nthe first failure, row 9: no"
    )
