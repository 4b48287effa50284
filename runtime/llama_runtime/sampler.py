"""The next token of each sequence, by its own parameters and its own random stream.

What a sequence draws depends on its seed, its sample and the index of the token alone: not on the
slot, the batch, the neighbours or the step of admission.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq

import numpy as np

from llama_runtime.sampling import Int64s, Kernels, Logits, Scores, uniform
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.stopping import end_token_ids


class Sampler:
    """Bias and penalties, then the kernels' choice, and log-probabilities where they are wanted.

    Args:
        kernels: what chooses and scores.
        eos_token_ids: every end token of the model.
    """

    def __init__(self, kernels: Kernels, eos_token_ids: Collection[int]) -> None:
        self._kernels = kernels
        self._eos_token_ids = eos_token_ids

    def sample(
        self, logits: Logits, seqs: Seq[Sequence]
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """The next token of each sequence.

        Args:
            logits: [R, V], row i belonging to the i-th sequence, those of one kind together; bias
                and penalties are written into them.
            seqs: the sequences.

        Returns:
            Token ids, ``NOT_FINITE`` where a row has a NaN or no finite maximum; and for each its
            log-probability, None where it isn't asked for.
        """
        params = [seq.params for seq in seqs]
        scored = [i for i, of_row in enumerate(params) if of_row.logprobs]
        untouched = logits[scored] if scored else logits[:0]
        for i, seq in enumerate(seqs):
            if seq.edited:
                edit(logits[i], seq, self._eos_token_ids)
        numbers = [
            0.0 if seq.params.greedy else uniform(seq.seed, seq.sample, seq.draw_index)
            for seq in seqs
        ]
        tokens = self._kernels.choose(logits, params, numbers)
        logprobs: list[TokenLogprob | None] = [None] * len(seqs)
        if scored:
            counts = [params[i].top_logprobs for i in scored]
            for i, logprob in zip(
                scored, self.score(untouched, tokens[scored], counts), strict=True
            ):
                logprobs[i] = logprob
        return tokens.tolist(), logprobs

    def score(self, logits: Logits, token_ids: Int64s, num_top: Seq[int]) -> list[TokenLogprob]:
        """Log-probabilities of one token a row, and of so many of the likeliest beside it."""
        scores: Scores = self._kernels.score(logits, np.maximum(token_ids, 0))
        return [
            TokenLogprob(
                int(token_id),
                float(scores.logprobs[i]),
                tuple(
                    zip(
                        scores.top_token_ids[i, :count].tolist(),
                        scores.top_logprobs[i, :count].tolist(),
                        strict=True,
                    )
                ),
            )
            for i, (token_id, count) in enumerate(zip(token_ids, num_top, strict=True))
        ]


def edit(row: Logits, seq: Sequence, eos_token_ids: Collection[int]) -> None:
    """Bias, penalties and the least length, written into a row of logits [V].

    The order, and what each means, is told by ``SamplingParams``.
    """
    params = seq.params
    if params.logit_bias:
        row[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if seq.counts is not None:
        ids, counts = seq.counts.token_ids, seq.counts.in_completion
        values = row[ids]
        if params.repetition_penalty != 1:
            penalty = np.float32(params.repetition_penalty)
            values = np.where(values < 0, values * penalty, values / penalty)
        values -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
        values -= np.float32(params.presence_penalty) * (counts > 0)
        row[ids] = values
    if seq.num_completion_tokens < params.min_tokens:
        row[[i for i in end_token_ids(seq, eos_token_ids) if i < len(row)]] = -np.inf
