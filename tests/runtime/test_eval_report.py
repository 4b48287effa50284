"""Figures of a quality report against the statistics module, and how they are shown."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llama_runtime.evaluation.gates import GATES, gate_of
from llama_runtime.evaluation.report import Figures, QualityReport, Scores

RNG = np.random.default_rng(2)


def scores(windows: list[int]) -> Scores:
    count = len(windows)
    reference = RNG.exponential(3, count)
    return Scores(
        divergences=RNG.exponential(0.01, count),
        agrees=RNG.random(count) < 0.9,
        nll=reference + RNG.normal(0.01, 0.2, count),
        reference_nll=reference,
        windows=np.array(windows),
    )


def report(precision: str = "int8", **changes: Any) -> QualityReport:
    figures = replace(Figures.of(scores([0] * 50 + [1] * 40)), **changes)
    return QualityReport(precision, "0" * 64, {"prose": figures, "non-English": figures}, figures)


def test_figures_are_what_they_are_called() -> None:
    given = scores([0] * 700 + [1] * 800)
    found = Figures.of(given)
    kl = sorted(given.divergences.tolist())
    place = 0.999 * (len(kl) - 1)
    low = kl[math.floor(place)]
    assert (found.tokens, found.windows) == (1500, 2)
    assert found.mean_kl == pytest.approx(statistics.fmean(kl))
    assert found.tail_kl == pytest.approx(low + (place % 1) * (kl[math.ceil(place)] - low))
    assert found.top1_agreement == sum(given.agrees.tolist()) / 1500
    bundle, source = (math.exp(statistics.fmean(x)) for x in (given.nll, given.reference_nll))
    assert found.perplexity == pytest.approx(bundle)
    assert found.reference_perplexity == pytest.approx(source)
    assert found.perplexity_ratio == pytest.approx(bundle / source)


def test_the_error_of_windows_of_one_token_is_that_of_a_mean() -> None:
    given = scores(list(range(500)))
    found = Figures.of(given)
    error = statistics.stdev(given.nll - given.reference_nll) / math.sqrt(500)
    assert found.perplexity_ratio_error == pytest.approx(found.perplexity_ratio * error)


def test_tokens_of_one_window_count_as_one_draw() -> None:
    """The same difference all through a window says no more than one token of it does."""
    one = scores(list(range(60)))
    many = Scores(*(np.repeat(getattr(one, name), 9) for name in Scores.__dataclass_fields__))
    assert Figures.of(many).perplexity_ratio_error == pytest.approx(
        Figures.of(one).perplexity_ratio_error
    )


def test_the_error_is_how_far_the_ratio_varies_from_text_to_text() -> None:
    """Windows whose tokens are off together, drawn again and again."""
    ratios, errors = [], []
    for _ in range(400):
        common = np.repeat(RNG.normal(0, 0.05, 40), 30)
        given = scores(np.repeat(np.arange(40), 30).tolist())
        figures = Figures.of(replace(given, nll=given.nll + common))
        ratios.append(figures.perplexity_ratio)
        errors.append(figures.perplexity_ratio_error or 0.0)
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(ratios), rel=0.1)


def test_one_window_has_no_error() -> None:
    found = Figures.of(scores([3] * 20))
    assert found.perplexity_ratio_error is None
    table = replace(report(), total=found).table()
    assert "±" not in table.splitlines()[-1]


def test_a_text_that_a_model_holds_for_impossible_has_figures_that_are_numbers() -> None:
    given = scores([0] * 5 + [1] * 5)
    found = replace(report(), total=Figures.of(replace(given, nll=given.nll + 1e6))).as_dict()
    assert "Infinity" not in json.dumps(found)


def test_the_table_is_aligned_and_fits_80_columns() -> None:
    cases: tuple[dict[str, Any], ...] = (
        {},
        {"mean_kl": 1.23456e-9, "tail_kl": 1.2345e-7, "perplexity_ratio": 1.0},
        {"tokens": 99_999, "perplexity": 1.2345e30, "reference_perplexity": 123456.0},
        {"mean_kl": 12.345, "tail_kl": 123.45, "top1_agreement": 1.0},
    )
    for changes in cases:
        lines = report(**changes).table().splitlines()
        assert [line.split()[0] for line in lines] == ["tokens", "prose", "non-English", "all"]
        assert len({len(line) for line in lines[1:]}) == 1
        assert max(map(len, lines)) < 80


def test_the_manifest_gets_six_digits_of_each_figure() -> None:
    found = report(mean_kl=0.123456789, top1_agreement=0.5).as_dict()
    assert found["mean_kl"] == 0.123457
    assert found["tokens"] == 90
    assert json.loads(json.dumps(found)) == found
    kinds = found["kinds"]
    assert isinstance(kinds, dict)
    assert list(kinds) == ["prose", "non-English"]
    assert kinds["prose"].items() <= found.items()


@pytest.mark.parametrize("precision", GATES)
def test_a_gate_has_two_posts(precision: str) -> None:
    gate = GATES[precision]
    good = {"mean_kl": gate.mean_kl, "top1_agreement": gate.top1_agreement}
    assert report(precision, **good).passed
    for bad in ({"mean_kl": gate.mean_kl * 1.001}, {"top1_agreement": gate.top1_agreement - 1e-3}):
        found = report(precision, **{**good, **bad})
        assert not found.passed
        assert len(found.shortfalls) == 1
        assert found.verdict() == f"{precision} fails: {found.shortfalls[0]}"
    assert len(report(precision, mean_kl=9.0, top1_agreement=0.0).shortfalls) == 2


@pytest.mark.parametrize("name", ["mean_kl", "top1_agreement"])
def test_a_figure_that_is_no_number_does_not_pass(name: str) -> None:
    good: dict[str, Any] = {"mean_kl": 0.0, "top1_agreement": 1.0}
    assert report(**good).passed
    assert not report(**{**good, name: math.nan}).passed


def test_gates_are_no_wider_for_more_bits() -> None:
    for fine, coarse in (("fp32", "int8"), ("int8", "int4")):
        assert GATES[fine].mean_kl < GATES[coarse].mean_kl
        assert GATES[fine].top1_agreement > GATES[coarse].top1_agreement


def test_a_cache_of_8_bits_has_the_wider_gate_of_the_two() -> None:
    for precision in GATES:
        gate, cached = GATES[precision], gate_of(f"{precision}+int8kv")
        assert cached is not None
        assert cached.mean_kl == max(gate.mean_kl, GATES["int8"].mean_kl)
        assert cached.top1_agreement == min(gate.top1_agreement, GATES["int8"].top1_agreement)


def test_a_precision_without_a_gate_does_not_pass() -> None:
    found = report("int3", mean_kl=0.0, top1_agreement=1.0)
    assert not found.passed
    assert found.verdict() == "there is no gate for the precision int3"
