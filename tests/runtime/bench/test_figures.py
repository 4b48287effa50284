"""Figures against the standard library's, and under vLLM's names."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.bench.figures import errors_of, figures, knee, most_at_once
from llama_runtime.bench.record import as_csv, thinned
from llama_runtime.bench.trace import Trace

# Of vllm/benchmarks/serve.py, as it writes them for the metrics ttft, tpot, itl and e2el and the
# percentiles 90 and 99.
VLLM = {
    *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
    *("request_throughput", "output_throughput", "total_token_throughput"),
    "max_concurrent_requests",
    *(
        f"{part}_{name}_ms"
        for part in ("mean", "median", "std", "p90", "p99")
        for name in ("ttft", "tpot", "itl", "e2el")
    ),
}
SECONDS = st.floats(0.001, 100)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    times = [draw(SECONDS)]
    for gap in draw(st.lists(SECONDS, max_size=6)):
        times.append(times[-1] + gap)
    return Trace(0.0, draw(st.integers(1, 99)), len(times), times)


@given(st.lists(traces(), min_size=2, max_size=8))
def test_means_and_percentiles_are_those_of_the_standard_library(several: list[Trace]) -> None:
    found = figures(several, 2.0)
    assert set(found) == VLLM
    values = {
        "ttft": [one.times[0] for one in several],
        "e2el": [one.times[-1] for one in several],
        "itl": [gap for one in several for gap in one.itls],
        "tpot": [
            (one.times[-1] - one.times[0]) / (len(one.times) - 1)
            for one in several
            if len(one.times) > 1
        ],
    }
    for name, seconds in values.items():
        ms = [1e3 * value for value in seconds]
        if not ms:
            assert found[f"median_{name}_ms"] is None
            continue
        assert found[f"mean_{name}_ms"] == pytest.approx(statistics.fmean(ms))
        assert found[f"median_{name}_ms"] == pytest.approx(statistics.median(ms))
        assert found[f"std_{name}_ms"] == pytest.approx(statistics.pstdev(ms), abs=1e-6)
        if len(ms) > 1:
            cuts = statistics.quantiles(ms, n=100, method="inclusive")
            assert found[f"p90_{name}_ms"] == pytest.approx(cuts[89])
            assert found[f"p99_{name}_ms"] == pytest.approx(cuts[98])
    assert found["total_output_tokens"] == sum(len(one.times) for one in several)
    assert found["output_throughput"] == found["total_output_tokens"] / 2
    both = found["total_input_tokens"] + found["total_output_tokens"]
    assert found["total_token_throughput"] == both / 2


def test_what_failed_is_counted_and_in_no_other_figure() -> None:
    good = Trace(0.0, 5, 2, [1.0, 2.0])
    failed = Trace(0.0, 7, 9, [50.0], "HTTP 500")
    found = figures([good, failed, failed], 2.0)
    alone = figures([good], 2.0)
    assert (found.pop("failed"), alone.pop("failed")) == (2, 0)
    assert found == alone
    assert errors_of([good, failed, failed]) == {"HTTP 500": 2}


def test_nothing_but_failures_has_rates_of_zero_and_no_latencies() -> None:
    found = figures([Trace(0.0, error="timed out")], 1.0)
    assert found["output_throughput"] == 0
    assert found["p99_itl_ms"] is None


def test_requests_at_once_are_those_whose_times_overlap() -> None:
    several = [Trace(0.0, times=[2.0]), Trace(1.0, times=[3.0]), Trace(2.0, times=[4.0])]
    assert most_at_once(several) == 2


def test_the_knee_is_the_least_size_that_comes_close_to_the_best() -> None:
    assert knee({1: 10, 2: 19, 4: 36, 8: 40, 16: 39}) == 4
    assert knee({1: 10, 2: 8}) == 1
    assert knee({8: 10}) is None


@given(st.lists(st.tuples(SECONDS, st.integers(0, 50)), min_size=1, max_size=60), st.integers(1, 9))
def test_a_few_samples_have_the_time_and_the_area_of_many(
    gaps: list[tuple[float, int]], most: int
) -> None:
    at, samples = 0.0, []
    for gap, value in gaps:
        at += gap
        samples.append((at, value))
    few = thinned(samples, most)
    assert len(few) == min(most, len(samples))
    assert few[-1][0] == pytest.approx(at, rel=1e-4)
    area = sum(gap * value for gap, value in gaps)
    width = at / len(few)
    assert sum(width * value for _, value in few) == pytest.approx(area, rel=1e-3, abs=1e-3 * at)
    values = [value for _, value in gaps]
    assert all(min(values) - 1e-3 <= value <= max(values) + 1e-3 for _, value in few)


def test_csv_has_a_column_for_every_single_value() -> None:
    runs = [{"a": 1, "list": [1]}, {"a": 2, "b": "x,y", "errors": {"HTTP 500": 1}}]
    assert as_csv(runs) == 'a,b,errors\n1,,\n2,"x,y","{""HTTP 500"": 1}"\n'
