"""Divergences by some tokens, the rest and draws from it, against those of torch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llama_runtime.errors import BackendError
from llama_runtime.evaluation import partition as module
from llama_runtime.evaluation.partition import Kept, divergences, predictions

ROWS, V = 40, 300
RNG = np.random.default_rng(0)
P = (4 * RNG.standard_normal((ROWS, V))).astype(np.float32)
P[0, 7] += 90  # all of the mass on one token
P[1] = 0
Q = P + RNG.standard_normal((ROWS, V)).astype(np.float32)
TARGETS = RNG.integers(0, V, ROWS)


def likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    return np.argsort(-logits, axis=1, kind="stable")[:, :count]


def kept(logits: np.ndarray, k: int, samples: np.ndarray) -> Kept:
    return predictions(logits, likeliest(P, k), samples, TARGETS).kept


def between(k: int) -> np.ndarray:
    """By the parts alone: where all ratios within the rest are 1, they add nothing."""
    p, q = (kept(logits, k, likeliest(P, V)[:, -1:]) for logits in (P, Q))
    flat = p.samples - p.parts[:, -1:] + q.parts[:, -1:]
    return divergences(p, Kept(q.parts, flat))


def over_everything() -> np.ndarray:
    p, q = (torch.from_numpy(x).double().log_softmax(1) for x in (P, Q))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(1).numpy()


@pytest.mark.parametrize("elements", [1, 7 * V, 1 << 20])
def test_logprobs_are_those_of_torch(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
    expected = torch.from_numpy(P).double().log_softmax(1)
    ids = likeliest(P, 16)
    samples = RNG.integers(0, V, (ROWS, 3))
    found = predictions(P, ids, samples, TARGETS)
    parts = found.kept.parts
    rest = expected.scatter(1, torch.from_numpy(ids), -torch.inf).logsumexp(1)
    assert rest.min() < -60  # which 1 less the others would not see
    np.testing.assert_allclose(parts[:, -1], rest, atol=1e-5)
    for token_ids, logprobs in ((ids, parts[:, :-1]), (samples, found.kept.samples)):
        wanted = expected.gather(1, torch.from_numpy(token_ids))
        np.testing.assert_allclose(logprobs, wanted, atol=1e-5)
    np.testing.assert_allclose(found.targets, expected[np.arange(ROWS), TARGETS], atol=1e-5)
    assert (found.best == P.argmax(axis=1)).all()


def test_with_all_tokens_but_one_the_divergence_is_that_over_everything() -> None:
    np.testing.assert_allclose(between(V - 1), over_everything(), atol=1e-6)


@pytest.mark.parametrize("k", [1, 16, 200])
def test_with_draws_it_is_in_the_mean_that_over_everything(k: int) -> None:
    rest = torch.from_numpy(P).double().softmax(1).scatter(1, torch.tensor(likeliest(P, k)), 0)
    torch.manual_seed(0)
    samples = rest.multinomial(20_000, replacement=True).numpy()
    p, q = (kept(logits, k, samples) for logits in (P, Q))
    found, expected = divergences(p, q), over_everything()
    assert (found >= between(k)).all()
    np.testing.assert_allclose(found, expected, rtol=0.1)
    assert found.mean() == pytest.approx(expected.mean(), rel=0.01)
    assert k > 100 or between(k).mean() < 0.9 * expected.mean()  # so that the draws matter


def test_samples_that_are_no_part_of_the_rest_do_no_more_than_mislead() -> None:
    samples = likeliest(P, 4)
    p, q = (kept(logits, 16, samples) for logits in (P, Q))
    q.parts[3, -1] = np.log(1e-300)
    assert np.isfinite(divergences(p, q)).all()


def test_fewer_tokens_can_only_lose() -> None:
    found = [between(k) for k in (1, 4, 16, 64, V - 1)]
    for coarse, fine in pairwise(found):
        assert (coarse <= fine + 1e-9).all()
        assert coarse.mean() < fine.mean()


def test_a_distribution_does_not_diverge_from_itself() -> None:
    some = kept(P, 16, likeliest(P, 32)[:, 16:])
    assert (divergences(some, some) == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_finite_numbers_are_refused(value: float) -> None:
    broken = P.copy()
    broken[5, 11] = value
    with pytest.raises(BackendError, match="no finite numbers"):
        kept(broken, 16, likeliest(P, 32)[:, 16:])
