"""Bias, penalties and the least length, and what is drawn after them, against other people's code.

The references are ``transformers``' processors, and OpenAI's formula for the penalties it lacks.
``scripts/prove_sampling`` draws with the numpy sampler too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_runtime.chunk import Chunk
from llama_runtime.params import SamplingParams
from llama_runtime.sampler import Sampler, edit
from llama_runtime.sampling import NOT_FINITE, Kernels, Reference
from llama_runtime.sequence import Sequence
from tests.sampling.frequencies import (
    CASES,
    COMPLETION,
    EOS,
    FALSE_ALARM,
    PROMPT,
    VOCAB_SIZE,
    ChiSquare,
    a_row,
    a_sequence,
    chi_square,
    counts_of_draws,
    distribution,
    edited,
)
from tests.sampling.rows import TOLERANCE, compiled

Row = npt.NDArray[np.float32]

KERNELS: dict[str, Callable[[int], Kernels]] = {
    "compiled": compiled,
    "numpy": lambda _: Reference(),
}
DRAWS = 20_000
# Each parameter that edits a row, alone and together.
EDITS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.3},
    "repetition below 1": {"repetition_penalty": 0.4},
    "presence": {"presence_penalty": 1.5},
    "presence below 0": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.8},
    "bias": {"logit_bias": {0: 3.5, 47: -2, 5: 100, 6: -100}},
    "min_tokens": {"min_tokens": 9, "max_tokens": 20},
    "min_tokens and stop tokens": {"min_tokens": 200, "stop_token_ids": {0, 47}},
    "min_tokens without the model's ends": {
        "min_tokens": 9,
        "stop_token_ids": {12},
        "ignore_eos": True,
    },
    "all": {
        "repetition_penalty": 1.4,
        "presence_penalty": -0.7,
        "frequency_penalty": 0.3,
        "logit_bias": {1: 4, 3: 2, 7: -9, 30: 0.5},
        "min_tokens": 12,
    },
}


def a_chunk(seq: Sequence, draft: Seq[int] = ()) -> Chunk:
    """The newest token of a sequence, and guesses at what follows it."""
    seq.cache_len = seq.num_tokens - 1
    return Chunk(seq, 1, draft)


# --- edits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_those_of_transformers(name: str) -> None:
    params, choose = SamplingParams(**EDITS[name]), random.Random(0)
    changed = 0
    for seed in range(100):
        row = a_row(seed)
        row[choose.randrange(VOCAB_SIZE)] = choose.choice([0, -0.0, -np.inf, 1e30])
        prompt = choose.choices(range(VOCAB_SIZE), k=choose.randint(1, 12))
        completion = choose.choices(range(VOCAB_SIZE), k=choose.randint(0, 14))
        expected = edited(row, params, prompt, completion)[0].numpy()
        found = row.copy()
        edit(found, a_sequence(params, prompt, completion), EOS)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
        changed += not np.array_equal(found, row)
    assert changed > 40


def test_edits_go_in_the_order_that_is_documented() -> None:
    """Bias before repetition, that before the other two, and no end token whatever its bias."""
    row = np.array([-1, 1, 2, 5], np.float32)
    params = SamplingParams(
        logit_bias={0: 3, 3: 100},
        repetition_penalty=2,
        presence_penalty=1,
        frequency_penalty=0.5,
        min_tokens=5,
    )
    edit(row, a_sequence(params, prompt=[0], completion=[0, 1, 1]), eos_token_ids=[3])
    assert row.tolist() == [(-1 + 3) / 2 - 1 - 0.5, 1 / 2 - 1 - 2 * 0.5, 2, -np.inf]


@pytest.mark.parametrize("name", EDITS)
def test_penalties_count_the_prompt_only_for_repetition(name: str) -> None:
    params = SamplingParams(**EDITS[name])
    with_prompt, without = a_row(1), a_row(1)
    edit(with_prompt, a_sequence(params, prompt=[40, 40, 41]), EOS)
    edit(without, a_sequence(params, prompt=[COMPLETION[0]]), EOS)
    other = set(np.flatnonzero(with_prompt != without).tolist())
    assert other == ({40, 41} if params.repetition_penalty != 1 else set())


def test_end_tokens_outside_the_vocabulary_are_no_matter() -> None:
    params = SamplingParams(min_tokens=50)
    row = a_row(2)
    edit(row, a_sequence(params), eos_token_ids=[VOCAB_SIZE + 5, 3])
    assert np.flatnonzero(np.isinf(row)).tolist() == [3]


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KERNELS)
def test_only_the_rows_of_those_who_ask_are_edited(kernels: str) -> None:
    params = [SamplingParams(), SamplingParams(**EDITS["all"]), SamplingParams(logprobs=True)]
    logits = np.stack([a_row(seed) for seed in range(3)])
    before = logits.copy()
    sampler = Sampler(KERNELS[kernels](VOCAB_SIZE), EOS)
    sampler.sample(logits, [a_chunk(a_sequence(of_row)) for of_row in params])
    same = [np.array_equal(*pair) for pair in zip(logits, before, strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize("kernels", KERNELS)
def test_log_probabilities_are_those_of_the_row_before_any_edit(kernels: str) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 4}
    several = [
        SamplingParams(**asked),
        SamplingParams(logprobs=True, **EDITS["all"]),
        SamplingParams(**asked, temperature=0.3, top_k=5, **EDITS["all"]),
    ]
    row = a_row(5)
    plain = np.log(distribution(row, SamplingParams(temperature=1)))
    sampler = Sampler(KERNELS[kernels](VOCAB_SIZE), EOS)
    chunks = [a_chunk(a_sequence(params)) for params in several]
    tokens, logprobs = sampler.sample(np.stack([row] * 3), chunks)
    likeliest = np.argsort(-row)[:4].tolist()
    for token, logprob, params in zip(tokens, logprobs, several, strict=True):
        assert logprob is not None
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(plain[token], abs=1e-6)
        assert [of_top[0] for of_top in logprob.top] == likeliest[: params.top_logprobs]
        assert [p for _, p in logprob.top] == pytest.approx(
            plain[likeliest[: params.top_logprobs]], abs=1e-6
        )
    assert tokens[0] == likeliest[0] != tokens[1]


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_row_that_is_not_finite_is_named_and_its_neighbours_are_scored(kernels: str) -> None:
    sampler = Sampler(KERNELS[kernels](VOCAB_SIZE), EOS)
    params = SamplingParams(logprobs=True, temperature=1)
    logits = np.stack([a_row(0), np.full(VOCAB_SIZE, np.nan, np.float32), a_row(2)])
    chunks = [a_chunk(a_sequence(params, seed=i)) for i in range(3)]
    with np.errstate(invalid="ignore"):
        tokens, logprobs = sampler.sample(logits, chunks)
    assert [token == NOT_FINITE for token in tokens] == [False, True, False]
    for row in (0, 2):
        plain = np.log(distribution(a_row(row), SamplingParams(temperature=1)))
        logprob = logprobs[row]
        assert logprob is not None
        assert logprob.logprob == pytest.approx(plain[tokens[row]], abs=1e-6)


# --- guesses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "nothing"])
def test_a_row_after_guesses_is_that_of_a_sequence_that_has_them(name: str, kernels: str) -> None:
    """Drawn token, log-probability and edits; whatever rows of others lie beside it."""
    sampler = Sampler(KERNELS[kernels](VOCAB_SIZE), EOS)
    params = replace(CASES[name], logprobs=True, top_logprobs=3, seed=5)
    draft = [47, COMPLETION[0], 47, PROMPT[1], 30]  # new ones, and such as were there before
    logits = np.stack([a_row(i) for i in range(len(draft) + 3)])
    beside = a_sequence(params, completion=[1], seed=2)
    seq = a_sequence(params, seed=7)
    rows = logits.copy()
    tokens, logprobs = sampler.sample(rows, [a_chunk(beside), a_chunk(seq, draft), a_chunk(beside)])
    for ahead in range(len(draft) + 1):
        grown = a_sequence(params, completion=[*COMPLETION, *draft[:ahead]], seed=7)
        row = logits[1 + ahead : 2 + ahead].copy()
        (token,), (logprob,) = sampler.sample(row, [a_chunk(grown)])
        assert tokens[1 + ahead] == token
        assert logprobs[1 + ahead] == logprob
        assert np.array_equal(rows[1 + ahead], row[0])
    assert len(tokens) == len(logprobs) == len(logits)


def test_guesses_are_counted_for_their_rows_alone() -> None:
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5)
    seq, untouched = a_sequence(params), a_sequence(params)
    sampler = Sampler(Reference(), EOS)
    sampler.sample(np.stack([a_row(i) for i in range(4)]), [a_chunk(seq, [46, 7, 46])])
    assert seq.counts is not None
    assert untouched.counts is not None
    assert seq.counts.token_ids.tolist() == untouched.counts.token_ids.tolist()
    assert seq.counts.in_completion.tolist() == untouched.counts.in_completion.tolist()
    assert seq.token_ids == untouched.token_ids


def test_the_least_length_counts_guesses() -> None:
    """Only the rows that lie below it are kept from ending."""
    seq = a_sequence(SamplingParams(min_tokens=len(COMPLETION) + 2))
    rows = np.stack([a_row(i) for i in range(4)])
    Sampler(Reference(), EOS).sample(rows, [a_chunk(seq, [1, 1, 1])])
    assert np.isinf(rows[:, EOS[0]]).tolist() == [True, True, False, False]


# --- distributions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_distribution_is_that_of_transformers(name: str) -> None:
    """A token is drawn between its borders: with the first number past one and the last before."""
    params = CASES[name]
    kernels: list[Kernels] = [compiled(VOCAB_SIZE), Reference()]
    for seed in range(25):
        row = a_row(seed)
        expected = distribution(row, params)
        edit(row, a_sequence(params), EOS)
        order = np.flatnonzero(expected)
        if params.filtered:
            order = order[np.argsort(-row[order], kind="stable")]
        ends = np.cumsum(expected[order])
        inside = 2 * TOLERANCE
        wide = expected[order] > 3 * inside
        numbers = np.concatenate([(ends - expected[order])[wide] + inside, ends[wide] - inside])
        args = np.tile(row, (len(numbers), 1)), [params] * len(numbers), numbers.tolist()
        for each in kernels:
            assert each.choose(*args).tolist() == [*order[wide], *order[wide]]


@pytest.mark.parametrize("name", CASES)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    row = a_row([*CASES].index(name))
    counts = counts_of_draws(compiled(VOCAB_SIZE), row, CASES[name], DRAWS)
    found = chi_square(counts, distribution(row, CASES[name]))
    assert counts.sum() == DRAWS
    assert found.holds, found


@pytest.mark.parametrize("name", [name for name in CASES if name != "nothing"])
def test_the_chi_square_sees_a_processor_that_is_missing(name: str) -> None:
    row = a_row([*CASES].index(name))
    exactly = DRAWS * distribution(row, SamplingParams(temperature=1))
    assert not chi_square(exactly, distribution(row, CASES[name])).holds


def test_the_limit_of_chi_square_is_a_rare_one() -> None:
    generator = np.random.default_rng(0)
    for degrees in (1, 5, 47):
        limit = ChiSquare(0.0, degrees, 0).limit
        assert generator.chisquare(degrees, 100 * round(1 / FALSE_ALARM**0.5)).max() < limit
        assert limit < 3 * degrees + 60


def test_the_sequence_of_these_tests_has_all_kinds_of_tokens() -> None:
    assert set(PROMPT) & set(COMPLETION)
    assert set(EOS) & set(PROMPT)
    assert len(set(COMPLETION)) < len(COMPLETION)
