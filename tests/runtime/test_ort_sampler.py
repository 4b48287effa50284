"""The compiled sampler against the numpy one, which is its specification, and against torch.

``scripts/prove_sampling`` compares 10,000 rows of each vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llama_runtime.backends import ort_sampler
from llama_runtime.backends.ort_sampler import CANDIDATES
from llama_runtime.contract import SAMPLER_ROWS
from llama_runtime.params import SamplingParams
from llama_runtime.sampling import NOT_FINITE, Logits, Reference, draw
from tests.sampling.rows import (
    JUST_BELOW_1,
    MIXES,
    SHAPES,
    Job,
    compare,
    compiled,
    every_kind,
    is_near,
    job,
    random_kinds,
    random_params,
    random_row,
)

LLAMA2, SMOLLM2, LLAMA3, PRIME = 32_000, 49_152, 128_256, 50_021
KINDS = {
    "greedy": SamplingParams(),
    "whole": SamplingParams(temperature=0.9),
    "filtered": SamplingParams(temperature=0.9, top_k=40, top_p=0.9),
}
NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("vocab_size", [LLAMA2, SMOLLM2, LLAMA3, PRIME])
def test_it_draws_what_the_reference_draws(vocab_size: int) -> None:
    """Rows of every shape with every set of filters, all in one call."""
    found = compare(compiled(vocab_size), job(rng(vocab_size), vocab_size, every_kind()))
    assert found.wrong == []
    assert found.equal + found.near == found.rows == len(SHAPES) * len(MIXES)
    assert found.near <= 3


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 97, 255, 256, 257, 1009])
def test_it_does_for_the_smallest_vocabularies_too(vocab_size: int) -> None:
    random = rng(vocab_size)
    found = compare(compiled(vocab_size), job(random, vocab_size, random_kinds(random, 600)))
    assert found.wrong == []
    assert found.near <= 6


class Off(Reference):
    """Has something a little wrong with the parameters."""

    def __init__(self, **change: Any) -> None:
        self._change = change

    def choose(
        self, logits: Logits, params: Seq[SamplingParams], numbers: Seq[float]
    ) -> npt.NDArray[np.int64]:
        return super().choose(logits, [replace(p, **self._change) for p in params], numbers)


@pytest.mark.parametrize(
    "change", [{"temperature": 0.81}, {"top_k": 99}, {"top_p": 0.89}, {"min_p": 0.051}], ids=str
)
def test_the_comparison_would_see_another_distribution(change: dict[str, float]) -> None:
    random = rng(1)
    (name,) = change
    near = {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.05}[name]
    params: Any = SamplingParams(**{"temperature": 0.8, name: near})  # type: ignore[arg-type]
    logits = np.stack([random_row(random, 1009, "normal") for _ in range(500)])
    right = Job(logits, [params] * 500, random.random(500).tolist())
    assert compare(Off(**{name: near}), right).equal == 500
    assert len(compare(Off(**change), right).wrong) > 5


def test_near_is_the_next_token_and_no_other() -> None:
    row = np.log(np.array([0.25, 0.5, 0.25], np.float32))
    whole, filtered = SamplingParams(temperature=1), SamplingParams(temperature=1, top_k=3)
    assert [is_near(row, whole, 0.25 - 1e-7, token) for token in range(3)] == [True, True, False]
    assert [is_near(row, whole, 0.25 - 1e-5, token) for token in range(3)] == [True, False, False]
    assert [is_near(row, filtered, 0.5, token) for token in range(3)] == [True, True, False]
    assert not is_near(row, SamplingParams(), 0.25, 1)
    assert not is_near(row, whole, 0.25, NOT_FINITE)


# --- filters ------------------------------------------------------------------------------------


@pytest.fixture
def drawn_in_numpy(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """The parameters of the rows that the graph left to numpy."""
    left: list[SamplingParams] = []

    def spy(logits: Logits, params: SamplingParams, number: float) -> int:
        left.append(params)
        return draw(logits, params, number)

    monkeypatch.setattr(ort_sampler, "draw_unsorted", spy)
    return left


def test_a_usual_row_never_needs_numpy(drawn_in_numpy: list[SamplingParams]) -> None:
    random = rng(2)
    params = [
        *(SamplingParams(temperature=0.7, top_p=0.9), SamplingParams(temperature=1, min_p=0.05)),
        *(SamplingParams(temperature=1, top_k=k, top_p=0.99) for k in (1, 40, 200, 255)),
    ]
    logits = np.stack([random_row(random, SMOLLM2, "sharp") for _ in params])
    compiled(SMOLLM2).choose(logits, params, random.random(len(params)).tolist())
    assert drawn_in_numpy == []


def test_more_tokens_kept_than_the_graph_looks_at_are_left_to_numpy(
    drawn_in_numpy: list[SamplingParams],
) -> None:
    random = rng(3)
    within = [
        *(KINDS["filtered"], SamplingParams(temperature=1, top_p=0.001)),
        *(SamplingParams(temperature=1, top_k=k, top_p=0.999) for k in (1, CANDIDATES - 1)),
    ]
    beyond = [
        *(SamplingParams(temperature=1, top_p=0.5), SamplingParams(temperature=1, min_p=0.7)),
        # Equals of the last may be outside the candidates.
        *(SamplingParams(temperature=1, top_k=k) for k in (CANDIDATES, CANDIDATES + 1, 5000)),
    ]
    flat = random_row(random, SMOLLM2, "flat")
    params = within + beyond
    job = Job(np.stack([flat] * len(params)), params, random.random(len(params)).tolist())
    assert compare(compiled(SMOLLM2), job).equal == len(params)
    assert drawn_in_numpy == beyond


def test_equals_of_the_kth_outside_the_candidates_are_kept_too() -> None:
    row = np.zeros(LLAMA2, np.float32)
    params = SamplingParams(temperature=1, top_k=5)
    numbers = [0.0, 0.3, 0.99, JUST_BELOW_1]
    found = compiled(LLAMA2).choose(np.stack([row] * 4), [params] * 4, numbers)
    assert found.tolist() == [int(number * LLAMA2) for number in numbers]


@pytest.mark.parametrize("top_k", [CANDIDATES - 1, CANDIDATES, 1000])
@pytest.mark.parametrize("shape", ["normal", "sharp", "flat"])
def test_the_last_number_draws_a_token_that_is_kept(shape: str, top_k: int) -> None:
    """Those after it have so little mass that rounding decides whether there is any."""
    logits = np.stack([random_row(rng(i), LLAMA2, shape) for i in range(10)])
    params = [SamplingParams(temperature=0.4, top_k=top_k)] * len(logits)
    tokens = compiled(LLAMA2).choose(logits, params, [JUST_BELOW_1] * len(logits))
    least = np.sort(logits, axis=1)[:, -top_k]
    assert (logits[np.arange(len(logits)), tokens] >= least).all()


# --- rows that can't be drawn from --------------------------------------------------------------


def unusable(vocab_size: int) -> list[Logits]:
    """Rows without a finite maximum, and ordinary ones with something in them."""
    rows = [np.full(vocab_size, value, np.float32) for value in (NAN, INF, -INF)]
    for place in (0, 1, vocab_size // 2, vocab_size - 1):
        for value in (NAN, INF):
            rows.append(random_row(rng(place), vocab_size, "language"))
            rows[-1][place] = value
            rows.append(np.full(vocab_size, -INF, np.float32))
            rows[-1][place] = value
    rows.append(random_row(rng(0), vocab_size, "normal"))
    rows[-1][[3, 5]] = INF, NAN
    rows.append(random_row(rng(0), vocab_size, "huge"))
    rows[-1][7] = NAN
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [LLAMA2, 1009])
def test_rows_that_are_not_finite_are_named_and_their_neighbours_unharmed(
    vocab_size: int, kind: str
) -> None:
    bad, shapes = unusable(vocab_size), list(SHAPES)
    good = [random_row(rng(i), vocab_size, shapes[i % len(shapes)]) for i in range(len(bad))]
    logits = np.stack([row for pair in zip(bad, good, strict=True) for row in pair])
    params, numbers = [KINDS[kind]] * len(logits), rng(5).random(len(logits)).tolist()
    found = compiled(vocab_size).choose(logits, params, numbers)
    assert found[::2].tolist() == [NOT_FINITE] * len(bad)
    alone = compiled(vocab_size).choose(np.stack(good), params[1::2], numbers[1::2])
    assert found[1::2].tolist() == alone.tolist()
    assert (alone != NOT_FINITE).all()


# --- scores -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 7, 20, 21, PRIME, LLAMA3])
def test_scores_are_the_log_softmax_of_torch(vocab_size: int) -> None:
    random = rng(vocab_size)
    logits = (4 * random.standard_normal((5, vocab_size))).astype(np.float32)
    token_ids = random.integers(vocab_size, size=5)
    expected = torch.from_numpy(logits.astype(np.float64)).log_softmax(-1)
    top = expected.topk(min(20, vocab_size))
    scores = compiled(vocab_size).score(logits, token_ids)
    assert scores.top_token_ids.tolist() == top.indices.tolist()
    assert scores.logprobs == pytest.approx(expected[range(5), token_ids].numpy(), abs=1e-6)
    assert scores.top_logprobs == pytest.approx(top.values.numpy(), abs=1e-6)


@pytest.mark.parametrize("vocab_size", [13, LLAMA2])
def test_scores_of_rows_of_every_shape_are_the_references(vocab_size: int) -> None:
    random = rng(vocab_size)
    logits = np.stack([random_row(random, vocab_size, shape) for shape in [*SHAPES] * 3])
    assert len(logits) > SAMPLER_ROWS
    token_ids = random.integers(vocab_size, size=len(logits))
    expected = Reference().score(logits, token_ids)
    found = compiled(vocab_size).score(logits, token_ids)
    assert found.top_token_ids.tolist() == expected.top_token_ids.tolist()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-7, atol=1e-6)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, rtol=1e-7, atol=1e-6)


# --- company ------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [LLAMA2, PRIME])
def test_a_row_alone_and_among_others_draws_and_scores_the_same(vocab_size: int) -> None:
    random = rng(8)
    several = job(random, vocab_size, random_kinds(random, 40))
    token_ids = random.integers(vocab_size, size=40)
    for threads in (1, 2):
        sampler = compiled(vocab_size, threads)
        tokens = sampler.choose(several.logits, several.params, several.numbers)
        scores = sampler.score(several.logits, token_ids)
        for i in range(40):
            one = slice(i, i + 1)
            args = several.logits[one], several.params[one], several.numbers[one]
            assert sampler.choose(*args)[0] == tokens[i]
            alone = sampler.score(several.logits[one], token_ids[one])
            for part, whole in zip(alone, scores, strict=True):
                assert part[0].tobytes() == whole[i].tobytes()


def test_rows_of_one_kind_must_lie_together() -> None:
    params = [KINDS["whole"], KINDS["greedy"]]
    with pytest.raises(ValueError, match="must lie together"):
        compiled(7).choose(np.zeros((2, 7), np.float32), params, [0.0, 0.0])


def test_no_rows_are_no_tokens() -> None:
    assert compiled(7).choose(np.zeros((0, 7), np.float32), [], []).tolist() == []


def test_the_logits_stay_as_they_are() -> None:
    random = rng(9)
    several = job(random, 97, every_kind())
    before = several.logits.copy()
    compiled(97).choose(several.logits, several.params, several.numbers)
    compiled(97).score(several.logits, np.zeros(len(before), np.int64))
    assert several.logits.tobytes() == before.tobytes()


def test_every_mix_of_filters_is_among_the_parameters() -> None:
    params = [random_params(rng(i), LLAMA2, mix) for i, mix in enumerate(MIXES)]
    assert len({(p.greedy, p.top_k > 0, p.top_p < 1, p.min_p > 0) for p in params}) == len(MIXES)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
