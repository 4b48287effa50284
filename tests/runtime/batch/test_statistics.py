"""What a job counts equals a recount, in memory that doesn't grow, through any interruption."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.batch.figures.histogram import SECOND_EDGES, TOKEN_EDGES, Histogram
from llama_runtime.batch.figures.statistics import MAX_ERROR_CHARS, MAX_ERRORS, Statistics
from llama_runtime.batch.figures.timeline import MAX_SAMPLES, Timeline
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.errors import CaravanError

tokens = st.integers(0, 300) | st.integers(0, 10**9) | st.sampled_from(TOKEN_EDGES)
times = st.floats(0, 20) | st.floats(0, 1e7) | st.sampled_from(SECOND_EDGES)
outcomes = st.builds(
    Outcome,
    index=st.integers(0, 10**7),
    line=st.just(b"{}\n"),
    error=st.none() | st.text(max_size=9),
    prompt_tokens=tokens,
    completion_tokens=tokens,
    finish_reasons=st.lists(st.sampled_from(["stop", "length", "error"]), max_size=3).map(tuple),
    seconds=times,
)


def counted(rows: list[Outcome]) -> Statistics:
    statistics = Statistics()
    for row in rows:
        statistics.count(row)
    return statistics


def through_json(statistics: Statistics) -> Any:
    return json.loads(json.dumps(statistics.to_dict(), allow_nan=False))


@given(st.lists(outcomes, max_size=40))
def test_counts_are_those_of_a_recount(rows: list[Outcome]) -> None:
    statistics = counted(rows)
    failed = sorted((row.index, row.error) for row in rows if row.error is not None)
    assert statistics.rows == len(rows)
    assert statistics.failed == len(failed)
    assert statistics.prompt_tokens == sum(row.prompt_tokens for row in rows)
    assert statistics.completion_tokens == sum(row.completion_tokens for row in rows)
    assert statistics.finish_reasons == Counter(r for row in rows for r in row.finish_reasons)
    assert statistics.first_errors == failed[:MAX_ERRORS]
    assert statistics.first_error == (failed[0] if failed else None)


@given(st.lists(outcomes, max_size=40), st.sampled_from(sorted(Statistics().per_row)))
def test_histograms_are_those_of_the_rows_that_ran(rows: list[Outcome], name: str) -> None:
    values = [getattr(row, name) for row in rows if row.prompt_tokens]
    record = counted(rows).to_dict()["per_row"][name]
    assert record["count"] == len(values)
    assert record["min"] == min(values, default=None)
    assert record["max"] == max(values, default=None)
    assert record["mean"] == (pytest.approx(sum(values) / len(values)) if values else None)
    for start, end, count in record["histogram"]:
        inside = [value for value in values if start <= value and (end is None or value < end)]
        assert len(inside) == count > 0
    assert sum(count for *_, count in record["histogram"]) == len(values)


@given(st.lists(tokens, min_size=1, max_size=60) | st.lists(times, min_size=1, max_size=60))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float]) -> None:
    edges = TOKEN_EDGES if isinstance(values[0], int) else SECOND_EDGES
    histogram = Histogram(edges)
    for value in values:
        histogram.add(value)
    for percent in (1, 50, 90, 99, 100):
        true = float(np.percentile(values, percent, method="inverted_cdf"))
        estimate = histogram.quantile(percent)
        assert estimate is not None
        assert min(values) <= estimate <= max(values)
        assert np.searchsorted(edges, estimate, "right") == np.searchsorted(edges, true, "right")
        assert isinstance(estimate, int) == isinstance(values[0], int)


def test_buckets_are_a_quarter_wide_where_numbers_allow() -> None:
    for edges in (SECOND_EDGES[1:], [edge for edge in TOKEN_EDGES if edge >= 8]):
        assert all(1.19 < high / low < 1.34 for low, high in pairwise(edges))
    assert list(TOKEN_EDGES[:7]) == [0, 1, 2, 3, 4, 5, 6]


def test_memory_is_bounded_whatever_the_number_of_rows_and_runs() -> None:
    draw = random.Random(1)
    statistics = Statistics()
    seconds = 0.0
    for index in range(200_000):
        outcome = Outcome(
            index, b"", "x" * 2000, index % 5000, index % 700, ("error",), draw.random() * 50
        )
        statistics.count(outcome)
        if index % 10 == 0:
            seconds += draw.expovariate(1)
            statistics.sample(seconds, index % 33)
        if index % 200 == 0:
            statistics.timeline.begin_run()
            seconds = 0.0
        assert len(statistics.timeline.samples) < MAX_SAMPLES
    assert statistics.timeline.runs == 1001
    assert len(statistics.timeline.marks) <= MAX_SAMPLES
    assert len(statistics.first_errors) == MAX_ERRORS
    assert all(len(message) == MAX_ERROR_CHARS for _, message in statistics.first_errors)
    assert len(json.dumps(statistics.to_dict())) < 150_000


@pytest.mark.parametrize("cadence", [0.01, 0.5, 10])
def test_a_long_job_is_as_clear_at_its_beginning_as_at_its_end(cadence: float) -> None:
    timeline = Timeline()
    for i in range(1, 20_001):
        timeline.add(i * cadence, i, 0, 0, 1)
    assert len(timeline.samples) >= MAX_SAMPLES // 5
    gaps = [after.seconds - before.seconds for before, after in pairwise(timeline.samples)]
    assert max(gaps) <= timeline.resolution + cadence + 1e-6


moments = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 9), st.integers(0, 64)), min_size=1, max_size=80
)


@given(moments, st.integers(1, 30), st.integers(0, 9))
def test_thinning_loses_no_work_and_no_time_of_slots(
    steps: list[tuple[int, int, int]], most: int, thinned: int
) -> None:
    timeline = Timeline()
    milliseconds = rows = slots = 0
    for step, new_rows, running in steps:
        milliseconds += step
        rows += new_rows
        slots += step * running
        timeline.add(milliseconds / 1000, rows, 2 * rows, 3 * rows, running)
    for _ in range(thinned):
        timeline._thin()
    pieces = timeline.pieces(most)
    assert timeline.seconds == milliseconds / 1000
    assert bool(pieces) == bool(milliseconds)
    assert len(pieces) <= most
    if pieces:
        lengths = [piece.end - piece.start for piece in pieces]
        assert lengths == pytest.approx([milliseconds / 1000 / len(pieces)] * len(pieces))
        for name, total in [
            ("rows", rows),
            ("prompt_tokens", 2 * rows),
            ("completion_tokens", 3 * rows),
            ("running", slots / 1000),
        ]:
            rates = [getattr(piece, name) for piece in pieces]
            assert np.dot(rates, lengths) == pytest.approx(total, abs=1e-6)


def test_a_piece_is_the_mean_over_its_time() -> None:
    timeline = Timeline()
    timeline.add(1, 10, 100, 50, 4)  # 10 rows/s with 4 slots, then 2 with 1
    timeline.add(2, 12, 120, 60, 1)
    timeline.add(3, 12, 120, 60, 1)
    first, second = timeline.pieces(2)
    assert (first.start, first.end, second.end) == (0, 1.5, 3)
    assert first.rows == pytest.approx((10 + 1) / 1.5)
    assert first.running == pytest.approx((4 + 0.5) / 1.5)
    assert second.rows == pytest.approx(1 / 1.5)
    assert second.running == pytest.approx(1)


# Times in 1/64 s, so that sums of them are exact.
works = st.lists(
    st.tuples(outcomes, st.integers(0, 200), st.integers(0, 32), st.booleans()), max_size=40
)


@given(works)
def test_a_resumed_job_goes_on_as_if_never_stopped(
    work: list[tuple[Outcome, int, int, bool]],
) -> None:
    whole, resumed = Statistics(), Statistics()
    now = began = stops = 0
    for outcome, step, running, stop in work:
        now += step
        for statistics, since in ((whole, 0), (resumed, began)):
            statistics.count(outcome)
            statistics.sample((now - since) / 64, running)
        if stop:
            resumed, began = Statistics.from_dict(through_json(resumed)), now
            stops += 1
    expected, found = whole.to_dict(), resumed.to_dict()
    assert found["timeline"].pop("runs") == expected["timeline"].pop("runs") + stops
    marks = found["timeline"].pop("runs_began")
    assert marks == sorted(set(marks))
    assert marks[0] == expected["timeline"].pop("runs_began")[0] == 0
    assert found == expected


def test_runs_are_marked_where_they_began() -> None:
    statistics = Statistics()
    statistics.sample(5, 1)
    for seconds in (3, 4):
        statistics = Statistics.from_dict(through_json(statistics))
        statistics.sample(seconds, 1)
    record = statistics.to_dict()
    assert record["seconds"] == 12
    assert record["timeline"]["runs"] == 3
    assert record["timeline"]["runs_began"] == [0, 5, 8]


@given(works)
def test_json_keeps_all_of_it(work: list[tuple[Outcome, int, int, bool]]) -> None:
    statistics = Statistics()
    for outcome, step, running, _ in work:
        statistics.count(outcome)
        statistics.sample(step / 64, running)
    assert through_json(statistics) == statistics.to_dict()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("rows",), "many"),
        (("finish_reasons",), ["stop"]),
        (("finish_reasons",), {"stop": "x"}),
        (("first_errors",), [3]),
        (("per_row", "seconds"), {}),
        (("per_row", "seconds", "histogram"), [[0.7, 0.8, 1]]),  # no such bucket
        (("per_row", "prompt_tokens", "count"), 2),
        (("timeline", "columns"), ["seconds"]),
        (("timeline", "samples"), [[1, 2]]),
    ],
)
def test_a_record_that_is_none_is_refused(path: tuple[str, ...], value: object) -> None:
    record = through_json(counted([Outcome(0, b"", None, 3, 4, ("stop",), 0.5)]))
    Statistics.from_dict(record)
    inner = record
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(CaravanError, match="earlier runs can't be read"):
        Statistics.from_dict(record)
    del inner[path[-1]]
    with pytest.raises(CaravanError, match="earlier runs can't be read"):
        Statistics.from_dict(record)
