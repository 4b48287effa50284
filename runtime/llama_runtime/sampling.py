"""From logits to tokens, in numpy: the specification of the compiled sampler.

A row is sampled by inverting the cumulative distribution at one uniform number: over the whole
vocabulary in order of token ids if no filter is on, else over the kept tokens from the likeliest
on, equal ones by token id. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llama_runtime.contract import MAX_TOP_LOGPROBS
from llama_runtime.params import SamplingParams

Floats = npt.NDArray[np.floating]
Int64s = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

NOT_FINITE = -1  # in place of a token id: the row held no finite maximum


class Scores(NamedTuple):
    """Log-probabilities of tokens and of the likeliest ones in their place."""

    logprobs: npt.NDArray[np.float64]  # [L]
    top_token_ids: Int64s  # [L, T], likeliest first
    top_logprobs: npt.NDArray[np.float64]  # [L, T]


class Kernels(Protocol):
    """What a sampler needs to be computed, here or in a graph."""

    def choose(self, logits: Logits, params: Seq[SamplingParams], numbers: Seq[float]) -> Int64s:
        """See ``Reference.choose``."""

    def score(self, logits: Logits, token_ids: Int64s) -> Scores:
        """See ``Reference.score``."""


class Reference:
    """The numpy kernels."""

    def choose(self, logits: Logits, params: Seq[SamplingParams], numbers: Seq[float]) -> Int64s:
        """The next token of each row.

        Args:
            logits: [R, V].
            params: of each row; rows of one ``sampling_kind`` lie together.
            numbers: in [0, 1), one a row; those of greedy rows mean nothing.

        Returns:
            Token ids [R], ``NOT_FINITE`` where a row has a NaN or no finite maximum.
        """
        tokens = likeliest(logits)
        for i, (of_row, number) in enumerate(zip(params, numbers, strict=True)):
            if not of_row.greedy and tokens[i] != NOT_FINITE:
                tokens[i] = draw(logits[i], of_row, number)
        return tokens

    def score(self, logits: Logits, token_ids: Int64s) -> Scores:
        """Log-probabilities under the softmax of each row.

        Args:
            logits: [L, V].
            token_ids: [L], the tokens whose log-probabilities are wanted.
        """
        rows = logits.astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        count = min(MAX_TOP_LOGPROBS, rows.shape[1])
        top = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        chosen = np.take_along_axis(rows, token_ids[:, None], axis=1)[:, 0]
        return Scores(chosen, top, np.take_along_axis(rows, top, axis=1))


def sampling_kind(params: SamplingParams) -> int:
    """Which branch a row takes: 0 greedy, 1 drawn from the whole vocabulary, 2 filtered."""
    return 0 if params.greedy else 1 + params.filtered


def likeliest(logits: Logits) -> Int64s:
    """The likeliest token of each row, of equal ones the first; ``NOT_FINITE`` if there is none."""
    tokens: Int64s = logits.argmax(
        axis=1
    )  # numpy's argmax stops at the first NaN, so a NaN shows here
    best = logits[np.arange(len(logits)), tokens]
    tokens[~np.isfinite(best)] = NOT_FINITE
    return tokens


def uniform(seed: int, sample: int, token_index: int) -> float:
    """A number in [0, 1) with 53 bits, from a counter-based stream.

    Source: Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
    keyed by (seed, sample), at counter (token index + 1, 0, 0, 0), first word, high bits.

    Args:
        seed: the sequence's seed, 0 to 2^64 - 1.
        sample: which of several completions of one prompt, from 0.
        token_index: which token of the completion, from 0.
    """
    # Arrays, because numpy makes floats of a list that mixes numbers above and below 2^63.
    key = np.array([seed, sample], np.uint64)
    counter = np.array([token_index, 0, 0, 0], np.uint64)  # numpy adds 1 before it draws
    stream = np.random.Philox(key=key, counter=counter)
    return float(stream.random_raw() >> 11) * 2.0**-53


def draw(logits: Logits, params: SamplingParams, number: float) -> int:
    """The token at ``number`` of the distribution that the parameters make of a row.

    Args:
        logits: [V], with a finite maximum.
        params: temperature above 0, and the filters.
        number: in [0, 1).
    """
    weights = weigh(logits, params.temperature)
    if not params.filtered:
        return _invert(weights, number)
    kept = _filter(logits, weights, params)
    return int(kept[_invert(weights[kept], number)])


def weigh(logits: Logits, temperature: float) -> npt.NDArray[np.float64]:
    """exp((l - max l) / T): probabilities, but for their sum."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()  # before the division, which can then overflow to -inf only
    with np.errstate(over="ignore"):
        scaled /= temperature
    weights: npt.NDArray[np.float64] = np.exp(scaled)
    return weights


def _filter(logits: Logits, weights: Floats, params: SamplingParams) -> npt.NDArray[np.intp]:
    """The tokens that pass, likeliest first.

    Compared by their logits, because weights may be equal after rounding. Tokens as likely as the
    k-th are kept with it, the nucleus is the shortest run of likeliest tokens that holds ``top_p``
    of what top_k kept, and ``min_p`` is of the likeliest: the meaning of ``transformers``.
    """
    order = np.argsort(-logits, kind="stable")
    if 0 < params.top_k < logits.size:
        order = order[logits[order] >= logits[order[params.top_k - 1]]]
    cumulative = weights[order].cumsum()
    if params.top_p < 1:
        order = order[: int(np.searchsorted(cumulative, params.top_p * cumulative[-1])) + 1]
    kept: npt.NDArray[np.intp] = order[weights[order] >= params.min_p * weights.max()]
    return kept


def _invert(weights: Floats, number: float) -> int:
    """The index at ``number`` of the cumulative distribution of unnormalised weights."""
    cumulative = weights.cumsum()
    # The target stays below the end: a number is at most 1 - 2^-53, and so takes more off a
    # total of 1 or more than rounding gives back.
    return int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
