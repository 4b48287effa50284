"""What a batch job says about itself: the settings, how far it is, and how it went."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from llama_runtime.batch.job import Tally
from llama_runtime.batch.recipe import Recipe
from llama_runtime.batch.results import ResultFile
from llama_runtime.params import SamplingParams
from llama_runtime.progress import duration
from llama_runtime.shared_engine import Stats

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


class Status:
    """How far a job is, as the parts of a status line.

    Args:
        tally: the job's, which it keeps up to date.
        stats: asks the model for its counters.
        total: how many rows there are; None if that isn't known.
    """

    def __init__(self, tally: Tally, stats: Callable[[], Stats], total: int | None) -> None:
        self._tally = tally
        self._stats = stats
        self._total = total
        self._started = time.monotonic()
        self._history: deque[tuple[float, int]] = deque([(self._started, 0)])

    def __call__(self) -> list[str]:
        """The parts, the most important first."""
        now, stats, done = time.monotonic(), self._stats(), self._tally.rows
        parts = [f"{done} rows" if self._total is None else f"{done}/{self._total} rows"]
        if self._total is not None and done:
            left = (now - self._started) * (self._total - done) / done
            parts.append(f"{duration(left)} left")
        parts.append(f"{self._rate(now, stats.completion_tokens):.0f} tokens/s")
        if self._tally.failed:
            parts.append(f"{self._tally.failed} failed")
        parts.append(f"{stats.running} active")
        return parts

    def _rate(self, now: float, completion_tokens: int) -> float:
        self._history.append((now, completion_tokens))
        while len(self._history) > 2 and self._history[1][0] <= now - RATE_SECONDS:
            self._history.popleft()
        since, before = self._history[0]
        return (completion_tokens - before) / max(now - since, 1e-9)


def summary(tally: Tally, seconds: float, results: ResultFile) -> str:
    """How a finished job went, in one line, or two if rows failed."""
    rows = "1 row" if tally.rows == 1 else f"{tally.rows:,} rows"
    text = (
        f"{rows}, {tally.failed:,} failed, in {seconds:.1f} s: "
        f"{tally.prompt_tokens:,} prompt and {tally.completion_tokens:,} completion tokens, "
        f"{tally.completion_tokens / max(seconds, 1e-9):.1f} tokens/s; results in {results}"
    )
    if tally.first_error is not None:
        index, error = tally.first_error
        text += f"\nthe first failure, row {index}: {error}"
    return text


def stopped(results: ResultFile, total: int | None) -> str:
    """Where a job that ended early has left its results."""
    of = "" if total is None else f" of {total}"
    return f"stopped: the results of {results.lines}{of} rows are in {results}"
