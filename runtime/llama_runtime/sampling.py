"""From logits to tokens, in numpy, each row by its own parameters and its own random stream.

The numbers that a sequence draws depend on its seed and the index of the token alone: not on the
slot, the batch, the neighbours or the step of admission.

A row is sampled by inverting the cumulative distribution at one uniform number: over the whole
vocabulary in order of token ids if no filter is on, else over the kept tokens from the likeliest
on, equal ones by token id.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence

Floats = npt.NDArray[np.floating]

# A nucleus is looked for among these many likeliest tokens before the whole row is sorted.
CANDIDATES = (256, 4096)
NOT_FINITE = -1  # in place of a token id: the row held no finite maximum


def sample(logits: npt.NDArray[np.float32], seqs: Seq[Sequence]) -> npt.NDArray[np.int64]:
    """The next token of each sequence.

    Args:
        logits: [R, V], row i belonging to the i-th sequence; more rows are ignored.
        seqs: the sequences that the rows belong to.

    Returns:
        Token ids [len(seqs)], ``NOT_FINITE`` where a row has a NaN or no finite maximum.
    """
    rows = logits[: len(seqs)]
    likeliest = rows.argmax(axis=1)  # numpy's argmax stops at the first NaN, so a NaN shows here
    best = rows[np.arange(len(seqs)), likeliest]
    tokens = np.where(np.isfinite(best), likeliest, NOT_FINITE)
    for i, seq in enumerate(seqs):
        if not seq.params.greedy and tokens[i] != NOT_FINITE:
            number = uniform(seq.seed, 0, seq.num_completion_tokens)
            tokens[i] = draw(rows[i], seq.params, number)
    return tokens


def uniform(seed: int, sample_index: int, token_index: int) -> float:
    """A number in [0, 1) with 53 bits, from a counter-based stream.

    Source: Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011),
    keyed by (seed, sample index), at counter (token index + 1, 0, 0, 0), first word, high bits.

    Args:
        seed: the sequence's seed, 0 to 2^64 - 1.
        sample_index: which of several samples of one prompt, from 0.
        token_index: which token of the completion, from 0.
    """
    # Arrays, because numpy makes floats of a list that mixes numbers above and below 2^63.
    key = np.array([seed, sample_index], np.uint64)
    counter = np.array([token_index, 0, 0, 0], np.uint64)  # numpy adds 1 before it draws
    stream = np.random.Philox(key=key, counter=counter)
    return float(stream.random_raw() >> 11) * 2.0**-53


def draw(logits: npt.NDArray[np.float32], params: SamplingParams, number: float) -> int:
    """The token at ``number`` of the distribution that the parameters make of a row.

    Args:
        logits: [V], with a finite maximum.
        params: temperature above 0, and the filters.
        number: in [0, 1).
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()  # before the division, which can then overflow to -inf only
    with np.errstate(over="ignore"):
        scaled /= params.temperature
    weights = np.exp(scaled)
    if not 0 < params.top_k < weights.size and params.top_p >= 1:
        return _invert(weights, number)
    kept = _nucleus(logits, weights, params.top_k, params.top_p)
    return int(kept[_invert(weights[kept], number)])


def _nucleus(logits: Floats, weights: Floats, top_k: int, top_p: float) -> npt.NDArray[np.intp]:
    """Tokens that top_k and then top_p keep, likeliest first.

    They are ranked by logits, because weights of different ones may be equal after rounding.
    Tokens as likely as the k-th are kept with it, and the nucleus is the shortest run of
    likeliest tokens that holds ``top_p`` of what top_k kept: the meaning of ``transformers``.
    """
    if 0 < top_k < weights.size:
        order = _likeliest(logits, top_k)
        if top_p >= 1:
            return order
        whole = weights[order].sum()
    else:
        whole = weights.sum()
        for count in (*CANDIDATES, logits.size):
            order = _likeliest(logits, count)
            if weights[order].sum() >= top_p * whole:
                break
    cumulative = weights[order].cumsum()
    return order[: int(np.searchsorted(cumulative, top_p * whole)) + 1]


def _likeliest(logits: Floats, count: int) -> npt.NDArray[np.intp]:
    """The ``count`` likeliest tokens and all equals of the last, likeliest first."""
    if count >= logits.size:
        return np.argsort(-logits, kind="stable")
    threshold = np.partition(logits, logits.size - count)[logits.size - count]
    tokens = np.flatnonzero(logits >= threshold)
    return tokens[np.argsort(-logits[tokens], kind="stable")]


def _invert(weights: Floats, number: float) -> int:
    """The index at ``number`` of the cumulative distribution of unnormalised weights."""
    cumulative = weights.cumsum()
    # The target stays below the end: a number is at most 1 - 2^-53, and so takes more off a
    # total of 1 or more than rounding gives back.
    return int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
