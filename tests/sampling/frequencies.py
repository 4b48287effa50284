"""What a row of logits and a sequence's parameters make a distribution of, by other people's code.

``transformers``' processors in float64, in their usual order; for the two penalties it lacks, the
formula that OpenAI publishes.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama_runtime.chunk import Chunk
from llama_runtime.detokenizer import Detokenizer
from llama_runtime.params import SamplingParams
from llama_runtime.sampler import Sampler
from llama_runtime.sampling import Kernels
from llama_runtime.sequence import Sequence

Row = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

FALSE_ALARM = 1e-6  # of each chi-square test, were its seeds drawn anew
EOS = (3, 9)
VOCAB_SIZE = 48
PROMPT = [1, 5, 5, 9, 20]
COMPLETION = [5, 7, 7, 7, 30]

# Every processor alone, then mixes.
CASES: dict[str, SamplingParams] = {
    "nothing": SamplingParams(temperature=1),
    "temperature": SamplingParams(temperature=0.6),
    "top_k": SamplingParams(temperature=1, top_k=7),
    "top_p": SamplingParams(temperature=1, top_p=0.8),
    "min_p": SamplingParams(temperature=1, min_p=0.1),
    "repetition": SamplingParams(temperature=1, repetition_penalty=1.7),
    "presence": SamplingParams(temperature=1, presence_penalty=1.2),
    "frequency": SamplingParams(temperature=1, frequency_penalty=0.7),
    "bias": SamplingParams(temperature=1, logit_bias={0: 2.5, 7: -1.5, 40: 1, 41: -100}),
    "min_tokens": SamplingParams(temperature=1, min_tokens=8, stop_token_ids=frozenset({11})),
    "filters": SamplingParams(temperature=1.4, top_k=20, top_p=0.9, min_p=0.03),
    "penalties": SamplingParams(
        temperature=0.8, repetition_penalty=0.8, presence_penalty=-0.6, frequency_penalty=0.4
    ),
    "all": SamplingParams(
        temperature=0.9,
        top_k=25,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={7: 2, 2: 1, 5: -3},
        min_tokens=6,
    ),
}


@dataclass(frozen=True)
class ChiSquare:
    """How frequent tokens were beside how frequent they should be.

    Attributes:
        statistic: of Pearson.
        degrees: of freedom.
        impossible: draws of tokens that can't be drawn.
    """

    statistic: float
    degrees: int
    impossible: int

    @property
    def limit(self) -> float:
        """What the statistic exceeds with a probability of at most ``FALSE_ALARM``.

        Source: Laurent and Massart, "Adaptive estimation of a quadratic functional by model
        selection", 2000, lemma 1.
        """
        x = -math.log(FALSE_ALARM)
        return self.degrees + 2 * math.sqrt(self.degrees * x) + 2 * x

    @property
    def holds(self) -> bool:
        """Whether the frequencies are believable."""
        return not self.impossible and self.statistic < self.limit


def a_row(seed: int, vocab_size: int = VOCAB_SIZE) -> Row:
    """Logits [V] whose tokens all have a chance."""
    return np.random.default_rng(seed).normal(0, 1.5, vocab_size).astype(np.float32)


def a_sequence(
    params: SamplingParams,
    prompt: list[int] = PROMPT,
    completion: list[int] = COMPLETION,
    seed: int = 0,
) -> Sequence:
    """A sequence in the middle of its completion; its text is nobody's business."""
    nothing: Detokenizer = None  # type: ignore[assignment]
    seq = Sequence(0, list(prompt), len(prompt), params, seed, nothing)
    for token_id in completion:
        seq.append(token_id)
    return seq


def edited(
    row: Row, params: SamplingParams, prompt: list[int], completion: list[int]
) -> torch.Tensor:
    """The row [1, V] in float64 before temperature and filters."""
    scores = torch.from_numpy(row.astype(np.float64))[None]
    ids = torch.tensor([prompt + completion])
    if params.logit_bias:
        bias = [[[token_id], float(value)] for token_id, value in params.logit_bias.items()]
        scores = SequenceBiasLogitsProcessor(bias)(ids, scores)
    if params.repetition_penalty != 1:
        processor = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        scores = processor(ids, scores)
    # "mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence", where c[j] is
    # how often token j was sampled before: the advanced-usage guide of OpenAI's API.
    for token_id, count in Counter(completion).items():
        scores[0, token_id] -= count * params.frequency_penalty + params.presence_penalty
    if params.min_tokens:
        ends = sorted({*params.stop_token_ids, *(() if params.ignore_eos else EOS)})
        least = MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, ends)
        scores = least(ids, scores)
    return scores


def distribution(
    row: Row,
    params: SamplingParams,
    prompt: list[int] = PROMPT,
    completion: list[int] = COMPLETION,
) -> Floats:
    """The probability of every token [V]."""
    scores = edited(row, params, prompt, completion)
    ids = torch.tensor([prompt + completion])
    scores = TemperatureLogitsWarper(float(params.temperature))(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    probabilities: Floats = scores.softmax(-1)[0].numpy()
    return probabilities


def counts_of_draws(kernels: Kernels, row: Row, params: SamplingParams, draws: int) -> Floats:
    """How often each token [V] comes, each draw with a seed of its own."""
    sampler, batch = Sampler(kernels, EOS), min(draws, 500)
    seqs = [a_sequence(params) for _ in range(batch)]
    chunks = [Chunk(seq, seq.num_tokens - seq.cache_len) for seq in seqs]
    counts = np.zeros(row.size)
    for start in range(0, draws, batch):
        for i, seq in enumerate(seqs):
            seq.seed = start + i
        tokens, _ = sampler.sample(np.tile(row, (batch, 1)), chunks)
        counts += np.bincount(tokens, minlength=row.size)
    return counts


def chi_square(counts: Floats, expected: Floats) -> ChiSquare:
    """Pearson's test; tokens expected less than five times are taken together."""
    means = expected * counts.sum()
    often = means >= 5
    seen = np.append(counts[often], counts[~often].sum())
    means = np.append(means[often], means[~often].sum())
    seen, means = seen[means > 0], means[means > 0]
    statistic = float(((seen - means) ** 2 / means).sum())
    return ChiSquare(statistic, len(means) - 1, int(counts[expected == 0].sum()))
