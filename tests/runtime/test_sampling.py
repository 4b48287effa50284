"""Sampling against independent implementations: plain Python, numpy's generator, transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.params import MAX_SEED, SamplingParams
from llama_runtime.sampling import NOT_FINITE, Reference, draw, likeliest, uniform
from llama_runtime.sequence import Sequence

Row = npt.NDArray[np.float32]

JUST_BELOW_1 = 1 - 2**-53
FALSE_ALARM = 1e-6  # of each chi-square test, were its seed drawn anew
SEEDS = (0, 1, 2**53 - 1, 2**53, 2**63 - 1, 2**63, 2**63 + 1, MAX_SEED - 1, MAX_SEED)

# Whole numbers make ties, eighths near misses, and the range makes weights that underflow.
any_logits = st.one_of(
    st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=40),
    st.lists(st.integers(-100, 100).map(lambda n: n / 8), min_size=1, max_size=40),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
).map(lambda values: np.array(values, np.float32))
temperatures = st.sampled_from([0.05, 0.5, 0.7, 1.0, 1.5, 10.0])
top_ks = st.just(0) | st.integers(1, 45)
TOP_PS = [0.001, 0.1, 0.5, 0.75, 0.95, 0.999, 1.0]


def naive(row: Row, params: SamplingParams) -> list[tuple[int, float]]:
    """Kept tokens and their probabilities, in the order in which they are inverted."""
    best = max(map(float, row))
    weights = [math.exp((float(logit) - best) / params.temperature) for logit in row]
    ranked = list(range(row.size))
    if params.filtered:
        ranked.sort(key=lambda token: (-row[token], token))
    if 0 < params.top_k < row.size:
        last = row[ranked[params.top_k - 1]]
        ranked = [token for token in ranked if row[token] >= last]
    whole = math.fsum(weights[token] for token in ranked)
    kept: list[tuple[int, float]] = []
    for token in ranked:
        if params.top_p < 1 and math.fsum(p for _, p in kept) >= params.top_p:
            break
        kept.append((token, weights[token] / whole))
    whole = math.fsum(p for _, p in kept)
    return [(token, p / whole) for token, p in kept]


def warped(row: Row, params: SamplingParams) -> npt.NDArray[np.float64]:
    """The row's probabilities after transformers' processors, in their usual order."""
    scores = torch.from_numpy(row.astype(np.float64))[None]
    ids = torch.zeros((1, 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(float(params.temperature))(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    probabilities: npt.NDArray[np.float64] = scores.softmax(-1)[0].numpy()
    return probabilities


def at_the_edge_of_a_nucleus(row: Row, params: SamplingParams) -> bool:
    """Whether rounding decides what top_p keeps."""
    masses = [p for _, p in naive(row, dataclasses.replace(params, top_p=1.0))]
    masses.sort(reverse=True)
    return any(abs(total - params.top_p) < 1e-9 for total in np.cumsum(masses))


def sequence(params: SamplingParams, *, seed: int = 0, num_completion_tokens: int = 0) -> Sequence:
    table = TokenBytes(byte_level_tokenizer())
    return Sequence(
        id=0,
        token_ids=[0] * (1 + num_completion_tokens),
        num_prompt_tokens=1,
        params=params,
        seed=seed,
        detokenizer=Detokenizer(table),
    )


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# --- draw ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", TOP_PS)
@settings(deadline=None, max_examples=60)
@given(row=any_logits, temperature=temperatures, top_k=top_ks, number=st.floats(0, JUST_BELOW_1))
def test_a_draw_inverts_the_cumulative_distribution(
    row: Row, temperature: float, top_k: int, top_p: float, number: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    assume(top_p == 1 or not at_the_edge_of_a_nucleus(row, params))
    kept = naive(row, params)
    edges = np.cumsum([p for _, p in kept])
    assume(np.abs(edges - number).min() > 1e-12 or number == 0)
    position = min(int((edges <= number).sum()), len(kept) - 1)
    assert draw(row, params, number) == kept[position][0]


@pytest.mark.parametrize("top_p", TOP_PS)
@settings(deadline=None, max_examples=60)
@given(row=any_logits, temperature=temperatures, top_k=top_ks)
def test_the_distribution_is_that_of_transformers(
    row: Row, temperature: float, top_k: int, top_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    assume(top_p == 1 or not at_the_edge_of_a_nucleus(row, params))
    expected = warped(row, params)
    order = np.flatnonzero(expected)
    if params.filtered:
        order = order[np.argsort(-row[order], kind="stable")]
    edges = np.cumsum(expected[order])
    starts = edges - expected[order]
    inside = 1e-8  # another kept set would move the edges further than this
    wide = expected[order] > 3 * inside
    firsts = [draw(row, params, number + inside) for number in starts[wide]]
    lasts = [draw(row, params, number - inside) for number in edges[wide]]
    assert firsts == lasts
    assert len(set(firsts)) == len(firsts)
    # Of equals at the edge of a nucleus transformers keeps any, we the first: compare by logit.
    assert row[firsts].tolist() == row[order[wide]].tolist()
    if top_p == 1:
        assert firsts == order[wide].tolist()


def support(row: Row, params: SamplingParams) -> set[int]:
    """Every token that a fine grid of numbers draws."""
    return {draw(row, params, number) for number in np.linspace(0, JUST_BELOW_1, 500)}


def test_equals_of_the_kth_likeliest_are_all_kept() -> None:
    row = np.array([1, 2, 1, 3, 1, 0], np.float32)
    params = SamplingParams(temperature=1, top_k=3)
    assert support(row, params) == {0, 1, 2, 3, 4} == set(np.flatnonzero(warped(row, params)))


def test_equals_at_the_edge_of_a_nucleus_are_kept_from_the_lowest_id_on() -> None:
    row = np.zeros(8, np.float32)
    for eighths in range(1, 8):
        params = SamplingParams(temperature=1, top_p=eighths / 8)
        assert support(row, params) == set(range(eighths))
        assert np.count_nonzero(warped(row, params)) == eighths


def test_a_nucleus_always_keeps_the_likeliest_token() -> None:
    row = np.array([0, 5, 4.9], np.float32)
    assert support(row, SamplingParams(temperature=1, top_p=5e-324)) == {1}


@pytest.mark.parametrize("row", [[0, 5, 4.9], [0, 2e-24, 1e-24]])
def test_top_k_of_1_is_greedy_unless_logits_are_equal(row: list[float]) -> None:
    # The second row's weights are equal after rounding.
    logits = np.array(row, np.float32)
    assert support(logits, SamplingParams(temperature=100, top_k=1)) == {1}


@pytest.mark.parametrize("top_k", [0, 255, 257, 1024, 4097])
def test_a_nucleus_larger_than_the_candidates_is_found_too(top_k: int) -> None:
    row = np.random.default_rng(3).normal(size=6000).astype(np.float32)
    row /= 4  # so flat that 0.9 of the mass needs more than 4,096 tokens
    for top_p in (0.01, 0.2, 0.9):
        params = SamplingParams(temperature=1, top_k=top_k, top_p=top_p)
        kept = np.flatnonzero(warped(row, params))
        order = kept[np.argsort(-row[kept], kind="stable")]
        edges = np.cumsum(warped(row, params)[order])
        numbers = np.concatenate([[0.0], (edges[:-1] + edges[1:]) / 2])
        drawn = [draw(row, params, number) for number in numbers[::29]]
        assert drawn == order[::29].tolist()


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}])
class TestExtremes:
    def test_the_first_and_the_last_number_draw_tokens_that_can_be_drawn(
        self, filters: dict[str, float]
    ) -> None:
        params = SamplingParams(temperature=1, **filters)  # type: ignore[arg-type]
        row = np.array([-np.inf, 2, -np.inf, 1, 1.5, -np.inf, -np.inf], np.float32)
        for number in (0.0, 5e-324, 2.0**-53, 1 - 2.0**-52, JUST_BELOW_1):
            assert draw(row, params, number) in {1, 3, 4}
        assert draw(row, params, 0.0) == 1
        assert draw(row, params, JUST_BELOW_1) == (3 if filters else 4)

    def test_rounding_never_draws_past_the_last_token(self, filters: dict[str, float]) -> None:
        params = SamplingParams(temperature=1, **filters)  # type: ignore[arg-type]
        rng = np.random.default_rng(0)
        for size in range(1, 200):
            row = rng.normal(size=size).astype(np.float32)
            row[rng.random(size) < 0.3] = -np.inf
            row[0] = 0
            assert row[draw(row, params, JUST_BELOW_1)] > -np.inf

    def test_huge_logits_do_not_overflow(self, filters: dict[str, float]) -> None:
        params = SamplingParams(temperature=1, **filters)  # type: ignore[arg-type]
        row = np.array([-3.4e38, 1e30, -1e30, 1e30, 0], np.float32)
        assert {draw(row, params, n) for n in (0.0, 0.3, 0.7, JUST_BELOW_1)} == {1, 3}

    @pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30, 1e-9])
    def test_the_smallest_temperatures_are_greedy_among_equals(
        self, filters: dict[str, float], temperature: float
    ) -> None:
        params = SamplingParams(temperature=temperature, **filters)  # type: ignore[arg-type]
        row = np.array([1, 2, -np.inf, 2, 1.99], np.float32)
        assert {draw(row, params, n) for n in (0.0, 0.3, 0.7, JUST_BELOW_1)} == {1, 3}

    def test_one_token_is_always_drawn(self, filters: dict[str, float]) -> None:
        params = SamplingParams(temperature=1, **filters)  # type: ignore[arg-type]
        row = np.array([-7.5], np.float32)
        assert draw(row, params, 0.0) == draw(row, params, JUST_BELOW_1) == 0


def test_a_draw_leaves_the_logits_as_they_are() -> None:
    row = np.array([1, 2, 3], np.float32)
    draw(row, SamplingParams(temperature=0.5, top_k=2, top_p=0.9), 0.5)
    assert row.tolist() == [1, 2, 3]


# --- frequencies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(SamplingParams(temperature=1), id="no filter"),
        pytest.param(SamplingParams(temperature=0.3), id="cold"),
        pytest.param(SamplingParams(temperature=2, top_k=5), id="top_k"),
        pytest.param(SamplingParams(temperature=1, top_p=0.8), id="top_p"),
        pytest.param(SamplingParams(temperature=1.5, top_k=12, top_p=0.9), id="both"),
    ],
)
@pytest.mark.parametrize("one_stream", [True, False], ids=["one stream", "a stream a draw"])
def test_frequencies_are_those_of_the_distribution(
    params: SamplingParams, one_stream: bool
) -> None:
    row = np.random.default_rng(11).normal(size=20).astype(np.float32)
    expected = warped(row, params)
    num_draws = 10_000
    keys = [(7, 0, i) if one_stream else (i, 0, 0) for i in range(num_draws)]
    counts = np.bincount([draw(row, params, uniform(*key)) for key in keys], minlength=row.size)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    often = expected * num_draws >= 5
    means = np.append(expected[often], expected[~often].sum()) * num_draws
    seen = np.append(counts[often], counts[~often].sum())
    means, seen = means[means > 0], seen[means > 0]
    statistic = float(((seen - means) ** 2 / means).sum())
    assert statistic < chi_square_limit(len(means) - 1)


def chi_square_limit(degrees: int) -> float:
    """What a chi-square variable exceeds with a probability of at most FALSE_ALARM.

    Source: Laurent and Massart, "Adaptive estimation of a quadratic functional by model
    selection", 2000, lemma 1.
    """
    x = -math.log(FALSE_ALARM)
    return degrees + 2 * math.sqrt(degrees * x) + 2 * x


# --- uniform ------------------------------------------------------------------------------------


def philox(counter: Seq[int], key: Seq[int]) -> list[int]:
    """Philox 4x64-10, from the paper."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c[2], 2**64)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [k[0] + 0x9E3779B97F4A7C15 & mask, k[1] + 0xBB67AE8584CAA73B & mask]
    return c


def test_philox_gives_the_known_answers_of_random123() -> None:
    # kat_vectors of github.com/DEShawResearch/random123
    assert philox([0] * 4, [0] * 2) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("token_index", [0, 1, 2, 3, 1000, 2**32, 2**40])
@pytest.mark.parametrize("sample_index", [0, 5])
def test_uniform_is_the_documented_philox(seed: int, sample_index: int, token_index: int) -> None:
    words = philox([token_index + 1, 0, 0, 0], [seed, sample_index])
    assert uniform(seed, sample_index, token_index) == (words[0] >> 11) / 2**53


@pytest.mark.parametrize("seed", SEEDS)
def test_uniform_is_the_first_of_each_block_of_numpys_generator(seed: int) -> None:
    key = seed + (3 << 64)  # as one number, low word first
    numbers = np.random.Generator(np.random.Philox(key=key)).random(40)[::4]
    assert [uniform(seed, 3, i) for i in range(10)] == numbers.tolist()


def test_uniform_never_changes() -> None:
    golden = {
        (0, 0, 0): 0.011546754286331562,
        (1, 0, 0): 0.3035680343067586,
        (1, 0, 1): 0.9002684531124185,
        (1, 1, 0): 0.0751511510959112,
        (9007199254740991, 0, 4095): 0.1359252979259582,
        (18446744073709551615, 0, 2): 0.05573648632486816,
    }
    assert {key: uniform(*key) for key in golden} == golden


def test_neighbours_of_a_stream_draw_unrelated_numbers() -> None:
    at = range(2000)
    streams = {
        "itself": [uniform(9, 0, i) for i in at],
        "next seed": [uniform(10, 0, i) for i in at],
        "next sample": [uniform(9, 1, i) for i in at],
        "seeds, at one token": [uniform(i, 0, 0) for i in at],
        "large seeds, at one token": [uniform(MAX_SEED - i, 0, 0) for i in at],
    }
    correlations = np.corrcoef([*streams.values(), [uniform(9, 0, i + 1) for i in at]])
    np.fill_diagonal(correlations, 0)
    # Of independent streams each is normal, of variance 1/2000: 5.5 deviations in 15 pairs are
    # rarer than 1e-6.
    assert np.abs(correlations).max() < 5.5 / math.sqrt(len(at))
    assert len({number for stream in streams.values() for number in stream}) > 4 * len(at)


# --- rows ---------------------------------------------------------------------------------------


def test_each_row_is_chosen_by_its_own_parameters_and_number() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    params = [
        SamplingParams(temperature=0.9, top_k=i) if i != 2 else SamplingParams() for i in range(6)
    ]
    numbers = [uniform(i, 0, i) for i in range(6)]
    expected = [
        int(logits[i].argmax()) if i == 2 else draw(logits[i], params[i], numbers[i])
        for i in range(6)
    ]
    assert Reference().choose(logits, params, numbers).tolist() == expected


def test_the_likeliest_is_the_first_of_equals() -> None:
    logits = np.array(
        [[0, 3, 3, -1], [-np.inf, -np.inf, -5, -np.inf], [1e30, 0, 1e30, 0]], np.float32
    )
    assert likeliest(logits).tolist() == [1, 2, 0]


NAN, INF = np.nan, np.inf
UNUSABLE = [
    [0, NAN, 1],
    [NAN, 0, 1],
    [0, 1, NAN],
    [NAN, NAN, NAN],
    [0, INF, 1],
    [INF, NAN, 0],
    [INF, INF, INF],
    [-INF, -INF, -INF],
    [-INF, NAN, -INF],
]


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.9}])
def test_rows_without_a_finite_maximum_are_not_chosen_from(params: dict[str, float]) -> None:
    logits = np.array([*UNUSABLE, [-INF, 5, -INF]], np.float32)
    rows = [SamplingParams(**params)] * len(logits)  # type: ignore[arg-type]
    chosen = Reference().choose(logits, rows, [0.5] * len(logits))
    assert chosen.tolist() == [NOT_FINITE] * len(UNUSABLE) + [1]


def test_scores_are_the_log_softmax_of_torch() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32) * 5
    token_ids = np.array([0, 39, 7, 7, 20])
    expected = torch.from_numpy(logits.astype(np.float64)).log_softmax(-1)
    scores = Reference().score(logits, token_ids)
    assert scores.logprobs == pytest.approx(expected[range(5), token_ids].numpy())
    top = expected.topk(20)
    assert scores.top_token_ids.tolist() == top.indices.tolist()
    assert scores.top_logprobs == pytest.approx(top.values.numpy())
