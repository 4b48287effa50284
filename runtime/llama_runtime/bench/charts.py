"""The charts of a record: throughput by size, latency by throughput, slots in use over time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from llama_runtime.bench import STRATEGIES
from llama_runtime.bench.figures import knee
from llama_runtime.bench.scales import Linear, Logarithmic, Sizes
from llama_runtime.bench.table import rates_of
from llama_runtime.bench.xy_chart import Chart, Series
from llama_runtime.pages.page_text import number, seconds

Run = Mapping[str, Any]


def charts(runs: Seq[Run], suffix: str = "") -> list[Chart]:
    """What there is to be drawn of runs with the same requests.

    Args:
        runs: of one workload.
        suffix: of the charts' names, so that several workloads have their own.
    """
    good = [run for run in runs if run["completed"]]
    found = [*_throughput(good, suffix), *_latency(good, suffix), *_occupancy(good, suffix)]
    return found


def _size(run: Run) -> int:
    return int(run.get("batch_size") or run["max_concurrency"] or run["max_concurrent_requests"])


def _name(run: Run) -> str:
    return str(run.get("strategy", "server"))


def _colour(name: str) -> int:
    return STRATEGIES.index(name) if name in STRATEGIES else 3


def _throughput(runs: Seq[Run], suffix: str) -> Iterator[Chart]:
    sizes = tuple(sorted({_size(run) for run in runs}))
    if len(sizes) < 2:
        return
    curves = rates_of(runs)
    series = [
        Series(name or "server", _colour(name), sorted(rates.items()))
        for name, rates in curves.items()
    ]
    for name in ("sequential", "concurrent"):
        points = [(_size(run), run["output_throughput"]) for run in runs if _name(run) == name]
        if points:
            series.append(Series(name, _colour(name), points))
    best = "continuous" if "continuous" in curves else next(iter(curves), None)
    least = knee(curves[best]) if best is not None else None
    marks = [] if least is None else [(least, f"90 % of the best: {least}")]
    words = "; ".join(
        f"{one.name} " + ", ".join(f"{x:g}: {number(y)}" for x, y in one.points) for one in series
    )
    yield Chart(
        name=f"throughput{suffix}",
        title="Throughput by requests at once",
        note="Completion tokens a second. The dotted line is the knee: the least size that reaches "
        "90 % of the best.",
        summary=f"Tokens a second: {words}.",
        x=(Sizes(sizes), "requests at once"),
        y=(Linear.to(max(y for one in series for _, y in one.points)), "tokens/s"),
        series=_ordered(series),
        marks=marks,
    )


def _latency(runs: Seq[Run], suffix: str) -> Iterator[Chart]:
    shown = [run for run in runs if run["median_itl_ms"] is not None]
    if not shown:
        return
    series = []
    for name in dict.fromkeys(map(_name, shown)):
        of = sorted((run for run in shown if _name(run) == name), key=_size)
        for figure, words in (("median_itl_ms", "p50"), ("p99_itl_ms", "p99")):
            series.append(
                Series(
                    name,
                    _colour(name),
                    [(run["output_throughput"], run[figure]) for run in of],
                    [str(_size(run)) for run in of] if words == "p50" else (),
                    dashed=words == "p99",
                )
            )
    rates = [x for one in series for x, _ in one.points]
    gaps = [y for one in series for _, y in one.points]
    yield Chart(
        name=f"latency{suffix}",
        title="Latency by throughput",
        note="Milliseconds between two tokens of a request: the median as a line, the 99th "
        "percentile dashed. Numbers are requests at once; right and below is better.",
        summary="; ".join(
            f"{one.name} {'p99' if one.dashed else 'p50'} "
            + ", ".join(f"{number(x)} tokens/s: {number(y)} ms" for x, y in one.points)
            for one in series
        ),
        x=(Linear.to(max(rates)), "tokens/s"),
        y=(Logarithmic.around(gaps), "ms between tokens: p50, and p99 dashed"),
        series=_ordered(series),
    )


def _occupancy(runs: Seq[Run], suffix: str) -> Iterator[Chart]:
    """Of each strategy with its most slots, on one axis of time."""
    largest: dict[str, Run] = {}
    for run in runs:
        if run["occupancy"] and _size(run) >= _size(largest.get(_name(run), run)):
            largest[_name(run)] = run
    if not largest:
        return
    series = [
        Series(name, _colour(name), _steps(run["occupancy"]), marked=False)
        for name, run in largest.items()
    ]
    slots = "strategy" in next(iter(largest.values()))
    what = "slots in use" if slots else "requests under way"
    yield Chart(
        name=f"occupancy{suffix}",
        title=what.capitalize(),
        note=f"{what.capitalize()} over time, each way with the most at once; where a line ends, "
        "all requests are answered.",
        summary="; ".join(
            f"{name}: {seconds(run['duration'])}, at most {_size(run)}"
            for name, run in largest.items()
        ),
        x=(Linear.to(max(one.points[-1][0] for one in series)), "seconds"),
        y=(Linear.to(max(y for one in series for _, y in one.points)), what),
        series=_ordered(series),
    )


def _steps(samples: Seq[Seq[float]]) -> list[tuple[float, float]]:
    """A line that stays level through each part of the time."""
    points = []
    before = 0.0
    for end, value in samples:
        points += [(before, value), (end, value)]
        before = end
    points.append((before, 0.0))
    return points


def _ordered(series: Seq[Series]) -> list[Series]:
    """The best above the others, and points above lines."""
    return sorted(series, key=lambda one: (len(one.points) == 1, one.colour))
