"""What a batch job says about itself: the settings, how far it is, and how it went."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.results.verify import Verdict
from llama_runtime.batch.runners.runner import RowRunner
from llama_runtime.params import SamplingParams
from llama_runtime.progress import duration

RATE_SECONDS = 10.0  # tokens per second are those of the last ten


def sampling(params: SamplingParams) -> str:
    """The sampling in force, in a few words."""
    if params.greedy:
        return "greedy"
    words = [f"temperature {params.temperature:g}"]
    if params.top_k:
        words.append(f"top_k {params.top_k}")
    if params.top_p < 1:
        words.append(f"top_p {params.top_p:g}")
    words.append("a fresh seed for each row" if params.seed is None else f"seed {params.seed}")
    return ", ".join(words)


def settings(recipe: Recipe) -> str:
    """The model and how rows are continued where they don't say otherwise."""
    name = recipe.encoder.bundle.manifest.name
    chat = "as chat" if recipe.chat else "as raw text"
    return (
        f"{name}: prompts {chat}, {sampling(recipe.params)}, max_tokens {recipe.params.max_tokens}"
    )


def set_up(runner: RowRunner, devices: Sequence[int] | None) -> str:
    """What runs the rows, in a few words."""
    about = dict(runner.about)
    if about.get("threads") is None:
        about.pop("threads", None)
        about["devices"] = ", ".join(map(str, devices or [0]))
    return ", ".join(f"{name} {value}" for name, value in about.items())


class Status:
    """How far a job is, as the parts of a status line.

    Args:
        statistics: the job's, which it keeps up to date.
        runner: what runs the rows.
        total: how many rows there are; None if that isn't known.
    """

    def __init__(self, statistics: Statistics, runner: RowRunner, total: int | None) -> None:
        self._statistics = statistics
        self._runner = runner
        self._total = total
        self._started = time.monotonic()
        self._before = statistics.rows  # done by earlier runs
        stats = runner.stats()  # of rows that the same model ran before
        begun = (self._started, stats.prompt_tokens, stats.completion_tokens)
        self._history: deque[tuple[float, int, int]] = deque([begun])

    def __call__(self) -> list[str]:
        """The parts, the most important first."""
        now, stats, done = time.monotonic(), self._runner.stats(), self._statistics.rows
        parts = [f"{done} rows" if self._total is None else f"{done}/{self._total} rows"]
        if self._total is not None and done > self._before:
            left = (now - self._started) * (self._total - done) / (done - self._before)
            parts.append(f"{duration(left)} left")
        read, made = self._rates(now, stats.prompt_tokens, stats.completion_tokens)
        parts.append(f"{made:.0f} tokens/s out")
        parts.append(f"{read:.0f} in")
        if self._statistics.failed:
            parts.append(f"{self._statistics.failed} failed")
        parts.append(f"{stats.running}/{self._runner.num_slots} slots")
        return parts

    def _rates(self, now: float, prompt_tokens: int, completion_tokens: int) -> tuple[float, float]:
        self._history.append((now, prompt_tokens, completion_tokens))
        while len(self._history) > 2 and self._history[1][0] <= now - RATE_SECONDS:
            self._history.popleft()
        since, read, made = self._history[0]
        seconds = max(now - since, 1e-9)
        return (prompt_tokens - read) / seconds, (completion_tokens - made) / seconds


def summary(statistics: Statistics, before: tuple[int, int], seconds: float, ledger: Ledger) -> str:
    """How a finished job went, in one line, or two if rows failed.

    Args:
        statistics: the job's.
        before: rows and completion tokens of earlier runs.
        seconds: how long this run took.
        ledger: where the results are.
    """
    rows = "1 row" if statistics.rows == 1 else f"{statistics.rows:,} rows"
    if before[0]:
        rows += f" ({statistics.rows - before[0]:,} of them now)"
    rate = (statistics.completion_tokens - before[1]) / max(seconds, 1e-9)
    text = (
        f"{rows}, {statistics.failed:,} failed, in {seconds:.1f} s: "
        f"{statistics.prompt_tokens:,} prompt and {statistics.completion_tokens:,} completion "
        f"tokens, {rate:.1f} tokens/s; results in {ledger.output}"
    )
    if ledger.errors is not ledger.output and statistics.failed:
        text += f", errors in {ledger.errors}"
    if statistics.first_error is not None:
        index, error = statistics.first_error
        text += f"\nthe first failure, row {index}: {error}"
    return text


def retried(statistics: Statistics, ledger: Ledger) -> str:
    """How rows went that were run again."""
    good = statistics.rows - statistics.failed
    text = f"{good:,} of {statistics.rows:,} went well this time; results in {ledger.output}"
    if ledger.errors is not ledger.output and statistics.failed:
        text += f", errors in {ledger.errors}"
    if statistics.first_error is not None:
        index, error = statistics.first_error
        text += f"\nthe first failure, row {index}: {error}"
    return text


def stopped(ledger: Ledger, total: int | None, *, can_resume: bool) -> str:
    """Where a job that ended early has left its results."""
    of = "" if total is None else f" of {total}"
    text = f"stopped: the results of {ledger.num_written}{of} rows are in {ledger.output}"
    return f"{text}; the same command goes on" if can_resume else text


def verdict(found: Verdict, ledger: Ledger) -> list[str]:
    """What a look at rows and results has found, in lines."""
    if not found.num_faults:
        return [
            f"{found.rows:,} rows have one result each, in its place, {found.failed:,} of them an "
            f"error: {ledger.output}"
        ]
    more = found.num_faults - len(found.faults)
    return [*found.faults, *([f"and {more:,} more"] if more else [])]
