"""The charts of a job's page, each with its figures in a table."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from itertools import pairwise
from math import floor, log10
from typing import Any

from llama_runtime.batch.figures.histogram import QUANTILES, SECOND_EDGES, TOKEN_EDGES
from llama_runtime.batch.figures.timeline import Piece, Timeline
from llama_runtime.pages import svg_charts
from llama_runtime.pages.page import details, table
from llama_runtime.pages.page_text import number, seconds, share, short
from llama_runtime.pages.svg_charts import Mark

_MOST_PIECES = 72  # of time: as many as can be told apart on a phone
_MOST_LABELS = 6  # along the buckets of a histogram
_MARKED = " Dotted lines, or ticks above a chart if they are many, are where runs began."
_PER_ROW: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("prompt_tokens", "Prompt tokens", number),
    ("completion_tokens", "Completion tokens", number),
    ("seconds", "Time", seconds),
)
_FIGURES = ("min", "mean", *(f"p{percent}" for percent in QUANTILES), "max")
_OVER_TIME = (  # attribute of a piece, title, unit
    ("completion_tokens", "Completion tokens per second", "tokens/s"),
    ("prompt_tokens", "Prompt tokens per second", "tokens/s"),
    ("running", "Slots in use", "slots"),
)


def over_time(record: Mapping[str, Any]) -> Iterator[str]:
    """The section of what changed over time.

    Args:
        record: from ``Timeline.to_dict``.
    """
    timeline = Timeline()
    timeline.load(record)
    rows = timeline.samples[-1].rows if timeline.samples else 0
    pieces = timeline.pieces(min(_MOST_PIECES, max(8, rows // 4)))
    yield "<h2>Over time</h2>"
    if not pieces:
        yield '<p class="note">The job has not worked long enough for a chart.</p>'
        return
    yield (
        '<p class="note">Time at work, its runs put end to end. A row\'s tokens count when '
        f"the row ends. Each step is the mean of {seconds(pieces[0].end)}."
        f"{_MARKED if timeline.runs > 1 else ''}</p>"
    )
    span = timeline.seconds
    numbered = len(timeline.marks) == timeline.runs
    marks = [
        Mark(100 * began / span, f"run {i}" if numbered else "")
        for i, began in enumerate(timeline.marks, 1)
        if i > 1
    ]
    for name, title, unit in _OVER_TIME:
        values = [getattr(piece, name) for piece in pieces]
        words = (
            f"Over {seconds(span)}: mean {number(sum(values) / len(values))}, "
            f"lowest {number(min(values))}, highest {number(max(values))} {unit}."
        )
        chart = svg_charts.over_time(f"time-{name}", title, words, values, span, marks)
        yield f"<figure><figcaption><h3>{title}</h3></figcaption>{chart}</figure>"
    yield details("Figures over time", _time_table(pieces))


def _time_table(pieces: Seq[Piece]) -> str:
    heads = ["From", "to", "rows/s", "prompt tokens/s", "completion tokens/s", "slots in use"]
    return table(
        heads,
        [
            [
                seconds(piece.start),
                seconds(piece.end),
                number(piece.rows),
                number(piece.prompt_tokens),
                number(piece.completion_tokens),
                number(piece.running),
            ]
            for piece in pieces
        ],
    )


def per_row(records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The section of how rows differ.

    Args:
        records: by "prompt_tokens", "completion_tokens" and "seconds", from ``Histogram.to_dict``.
    """
    yield "<h2>Per row</h2>"
    if not records["seconds"]["count"]:
        yield '<p class="note">No row has run yet.</p>'
        return
    yield (
        '<p class="note">Rows that ran, each in a bucket a quarter wider than the one before: '
        "the x axes are logarithmic. Quantiles are estimated within a bucket.</p>"
    )
    yield '<div class="three">'
    yield _histogram("prompt_tokens", "Prompt tokens", records, TOKEN_EDGES, number, short)
    yield _histogram("completion_tokens", "Completion tokens", records, TOKEN_EDGES, number, short)
    yield _histogram("seconds", "Time from start to end", records, SECOND_EDGES, seconds, seconds)
    yield "</div>"
    yield table(
        ["", *(heading for _, heading, _ in _PER_ROW)],
        [
            [figure, *(show(records[name][figure]) for name, _, show in _PER_ROW)]
            for figure in _FIGURES
        ],
    )


def _histogram(
    name: str,
    title: str,
    records: Mapping[str, Mapping[str, Any]],
    edges: Seq[float],
    show: Callable[[float], str],
    label: Callable[[float], str],
) -> str:
    record = records[name]
    buckets = _with_empty_ones(record["histogram"], edges)
    first = edges.index(buckets[0][0])
    ranges = [_range(start, end, show) for start, end, _ in buckets]
    total = record["count"]
    lines = [
        [shown, number(count), share(count, total)]
        for shown, (_, _, count) in zip(ranges, buckets, strict=True)
    ]
    words = f"{number(total)} rows: " + ", ".join(
        f"{figure} {show(record[figure])}" for figure in ("min", "p50", "p90", "p99", "max")
    )
    marks = [Mark(_place(record[f"p{q}"], edges, first, len(buckets)), f"p{q}") for q in QUANTILES]
    chart = svg_charts.bars(
        f"row-{name}",
        title,
        f"{words}.",
        [count for _, _, count in buckets],
        [
            f"{shown}: {number(count)} rows"
            for shown, (_, _, count) in zip(ranges, buckets, strict=True)
        ],
        _labels([start for start, _, _ in buckets], label),
        marks,
    )
    return (
        f"<figure><figcaption><h3>{title}</h3><p>number of rows</p></figcaption>{chart}"
        + details("Figures", table([title, "rows", "share"], lines))
        + "</figure>"
    )


def _with_empty_ones(
    buckets: Seq[tuple[float, float | None, int]], edges: Seq[float]
) -> list[tuple[float, float | None, int]]:
    """All buckets from the first to the last that holds something."""
    counts = {start: count for start, _, count in buckets}
    starts = [edge for edge in edges if buckets[0][0] <= edge <= buckets[-1][0]]
    ends: dict[float, float] = dict(pairwise(edges))
    return [(start, ends.get(start), counts.get(start, 0)) for start in starts]


def _range(start: float, end: float | None, show: Callable[[float], str]) -> str:
    if end is None:
        return f"{show(start)} or more"
    if not isinstance(start, int):
        return f"{show(start)} to {show(end)}"
    return show(start) if end == start + 1 else f"{show(start)} to {show(end - 1)}"


def _place(value: float, edges: Seq[float], first: int, num_buckets: int) -> float:
    """Where a value lies across buckets of one width, in percent."""
    bucket = bisect_right(edges, value) - 1
    part = 0.5
    if bucket + 1 < len(edges):
        part = (value - edges[bucket]) / (edges[bucket + 1] - edges[bucket])
        if edges[bucket + 1] - edges[bucket] == 1 and isinstance(edges[0], int):
            part = 0.5
    return 100 * (bucket - first + part) / num_buckets


def _labels(starts: Seq[float], label: Callable[[float], str]) -> list[tuple[float, str]]:
    """Ticks at the starts of buckets, at the roundest ones of which there are enough."""
    ticks = [(100 * i / len(starts), label(start)) for i, start in enumerate(starts)]
    for leading in ((1, 2, 5), (1,)):
        if len(ticks) <= _MOST_LABELS and len(_with_room(ticks)) == len(ticks):
            break
        chosen = [i for i, start in enumerate(starts) if _leading(start) in leading]
        ticks = [(100 * i / len(starts), label(starts[i])) for i in chosen]
    return _with_room(ticks)


def _with_room(ticks: Seq[tuple[float, str]]) -> list[tuple[float, str]]:
    """Those that don't touch the one before."""
    kept: list[tuple[float, str]] = []
    for at, label in ticks:
        if not kept or at - kept[-1][0] >= _room(kept[-1][1]) + _room(label):
            kept.append((at, label))
    return kept


def _room(label: str) -> float:
    """Half of the width that a label takes, in percent of a narrow chart's."""
    return 1.6 * (len(label) + 1.5)


def _leading(value: float) -> float:
    """The first digit of a round number, with what follows it: 2 of 200, 1.25 of 125."""
    return round(value / 10 ** floor(log10(value)), 6) if value else 1
