"""The figures as a table for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import groupby
from typing import Any

from llama_runtime.bench.figures import knee
from llama_runtime.pages.page_text import number

WIDTH = 80
_GAP = " "

Run = Mapping[str, Any]
Column = tuple[str, str, Callable[[Run], str]]


def _figure(name: str, scale: float = 1.0) -> Callable[[Run], str]:
    def show(run: Run) -> str:
        value = run.get(name)
        return "–" if value is None else number(value * scale)

    return show


def _share(name: str) -> Callable[[Run], str]:
    def show(run: Run) -> str:
        value = run.get(name)
        return "–" if value is None else f"{100 * value:.0f}"

    return show


_RATES: tuple[Column, ...] = (
    ("req/s", "", _figure("request_throughput")),
    ("out", "tok/s", _figure("output_throughput")),
    ("total", "tok/s", _figure("total_token_throughput")),
    ("TTFT", "p50 ms", _figure("median_ttft_ms")),
    ("ITL", "p50 ms", _figure("median_itl_ms")),
    ("ITL", "p99 ms", _figure("p99_itl_ms")),
    ("E2E", "p50 ms", _figure("median_e2el_ms")),
)
_LOCAL: tuple[Column, ...] = (
    ("strategy", "", lambda run: str(run["strategy"])),
    ("batch", "", lambda run: str(run["batch_size"])),
    *_RATES,
    ("RAM", "MB", _figure("peak_memory_bytes", 1e-6)),
    ("mem", "%", _share("bandwidth_share")),
    ("ops", "%", _share("compute_share")),
)
_SERVED: tuple[Column, ...] = (
    ("at once", "", lambda run: str(run["max_concurrency"] or "any")),
    ("rate", "", lambda run: str(run["request_rate"])),
    ("failed", "", lambda run: str(run["failed"])),
    *_RATES,
    ("TTFT", "p99 ms", _figure("p99_ttft_ms")),
)


def as_text(record: Mapping[str, Any]) -> str:
    """All tables of a record, a kind of requests each, and what is to be said of them."""
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    for key, group in groupby(record["runs"], key=workload_of):
        runs = list(group)
        yield workload_text(key)
        yield from _table(_LOCAL if "strategy" in runs[0] else _SERVED, runs)
        yield from knees(runs)
        yield ""
    limits = record.get("limits")
    if limits is not None:
        yield from _limits(limits)
    yield from _folded(" ".join(record["notes"]))


def workload_of(run: Run) -> tuple[str, str, int]:
    """What runs of one table have in common."""
    return run["input_len"], run["output_len"], run["num_prompts"]


def workload_text(key: tuple[str, str, int]) -> str:
    """What was asked, in words."""
    input_len, output_len, num_prompts = key
    if input_len == output_len == "sharegpt":
        lengths = "lengths of a data set"
    else:
        lengths = f"{input_len} tokens in, {output_len} out"
    return f"{num_prompts} requests, {lengths}"


def knees(runs: Seq[Run]) -> list[str]:
    """For each way, the least size that comes close to the best."""
    found = []
    for name, rates in rates_of(runs).items():
        least = knee(rates)
        if least is not None:
            what = name or "this server"
            found.append(f"{what}: 90 % of its best with {least} at once")
    return found


def rates_of(runs: Seq[Run]) -> dict[str, dict[int, float]]:
    """Output tokens a second by size, of each way that ran with several sizes.

    What runs one at a time is the beginning of all of them.
    """
    found: dict[str, dict[int, float]] = {}
    alone = {
        run["batch_size"]: run["output_throughput"]
        for run in runs
        if run.get("strategy") == "sequential"
    }
    for run in runs:
        name, size = run.get("strategy", ""), run.get("batch_size") or run["max_concurrency"]
        if name not in ("sequential", "concurrent") and size:
            found.setdefault(name, dict(alone))
            found[name][size] = run["output_throughput"]
    return found


def _table(columns: Seq[Column], runs: Seq[Run]) -> Iterator[str]:
    cells = [
        [head for head, _, _ in columns],
        [unit for _, unit, _ in columns],
        *([show(run) for _, _, show in columns] for run in runs),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        parts = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield _GAP.join(parts).rstrip()


def _limits(limits: Mapping[str, Any]) -> Iterator[str]:
    kind = limits["kind"]
    yield from _folded(
        f"mem: share of {limits['bandwidth'] / 1e9:,.1f} GB/s that this "
        f"{'GPU copies' if limits['threads'] is None else 'machine reads'}; ops: of "
        f"{limits['rates'][kind] / 1e9:,.0f} G operations/s of products of {kind}. What is "
        "counted: llama-run bench --help."
    )


def _folded(text: str) -> Iterator[str]:
    """Words in lines of at most 80 characters; a longer word has a line to itself."""
    line = ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > WIDTH:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    if line:
        yield line
