"""Two distributions over a vocabulary, compared by a part of what they say.

Of each the likeliest tokens of the first are known, and the sum of the rest. That alone gives a
divergence that is too small, by a quarter where 32 tokens are kept, for the rest differs within
itself too. So some tokens of the rest are known as well, drawn at random as the first distribution
has them. Let P and Q be what the rest has in all, p and q what one token of it has, and
r = (q/Q) / (p/P). Then the rest adds P times the mean of r - 1 - log r over what it holds, and the
mean over the drawn tokens is that one but for chance. No term is negative, and where the two
distributions are near each other the terms vary little.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llama_runtime.errors import BackendError

Floats = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.integer[Any]]

BLOCK_ELEMENTS = 1 << 20  # of the logits that are looked at together: 4 MB
_LEAST = 1e-300  # a probability whose logarithm is still a number


class Kept(NamedTuple):
    """What is known of distributions, one a row, as log-probabilities.

    Attributes:
        parts: [R, K + 1], of some tokens and of all others together.
        samples: [R, M], of some of those others.
    """

    parts: Floats
    samples: Floats


class Prediction(NamedTuple):
    """What is taken from rows of logits.

    Attributes:
        kept: of their distributions.
        targets: [R], log-probability of one token a row.
        best: [R], the likeliest token.
    """

    kept: Kept
    targets: Floats
    best: npt.NDArray[np.int64]


def predictions(
    logits: Logits, top_ids: TokenIds, sample_ids: TokenIds, targets: TokenIds
) -> Prediction:
    """Log-probabilities of some tokens of each row, and of the rest.

    Args:
        logits: [R, V].
        top_ids: [R, K], different ones in each row.
        sample_ids: [R, M], any of the others.
        targets: [R], any.

    Raises:
        BackendError: a logit is no finite number.
    """
    step = max(1, BLOCK_ELEMENTS // logits.shape[1])
    found = [
        _predictions(logits[rows], top_ids[rows], sample_ids[rows], targets[rows])
        for rows in (slice(start, start + step) for start in range(0, len(logits), step))
    ]
    parts, samples, aims, best = (np.concatenate(column) for column in zip(*found, strict=True))
    return Prediction(Kept(parts, samples), aims, best)


def divergences(p: Kept, q: Kept) -> Floats:
    """Kullback-Leibler divergences of q from p in nats, of each row, as far as they are known.

    Args:
        p: what the tokens were chosen by.
        q: of the same tokens.

    Returns:
        [R], none negative; over many rows their mean is that of the divergences over the whole
        vocabulary, if the samples were drawn as p has them.
    """
    coarse = (np.exp(p.parts) * (p.parts - q.parts)).sum(axis=1)
    rest_p, rest_q = p.parts[:, -1:], q.parts[:, -1:]
    # No token of the rest has more than all of it, whatever a rounding or a clamp made of both.
    ratios = np.minimum(q.samples - rest_q, 0) - np.minimum(p.samples - rest_p, 0)
    within = (np.expm1(ratios) - ratios).mean(axis=1)
    total: Floats = coarse + np.exp(rest_p[:, 0]) * within
    return np.maximum(total, 0.0)  # which rounding may pass by 1e-16


def _predictions(
    logits: Logits, top_ids: TokenIds, sample_ids: TokenIds, targets: TokenIds
) -> tuple[npt.NDArray[Any], ...]:
    ids = top_ids.astype(np.int64)
    peaks = logits.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # what isn't a number is refused below
        weights = np.exp(logits - peaks)
    top = np.take_along_axis(weights, ids, axis=1).sum(axis=1, dtype=np.float64)
    np.put_along_axis(weights, ids, 0, axis=1)
    # Summed without the others: 1 less their sum would be noise where nearly all is theirs.
    rest = weights.sum(axis=1, dtype=np.float64)
    total = top + rest
    if not (np.isfinite(total).all() and np.isfinite(logits.min())):
        raise BackendError("the graph gave logits that are no finite numbers")
    shift = (peaks[:, 0] + np.log(total))[:, None]

    def logprobs(token_ids: TokenIds) -> Floats:
        found: Floats = np.take_along_axis(logits, token_ids.astype(np.int64), axis=1) - shift
        return found

    others = np.log(np.maximum(rest / total, _LEAST))
    return (
        np.column_stack([logprobs(ids), others]),
        logprobs(sample_ids),
        logprobs(targets[:, None])[:, 0],
        logits.argmax(axis=1),
    )
