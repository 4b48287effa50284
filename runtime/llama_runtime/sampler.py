"""The next token of each sequence, by its own parameters and its own random stream.

What a sequence draws depends on its seed, its sample and the index of the token alone: not on the
slot, the batch, the neighbours or the step of admission.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager

import numpy as np

from llama_runtime.chunk import Chunk
from llama_runtime.grammar_masks import Masks, forbid
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
        self, logits: Logits, chunks: Seq[Chunk], masks: Masks | None = None
    ) -> tuple[list[int], list[TokenLogprob | None]]:
        """The next token of each sequence, and the one after each guess.

        Args:
            logits: [R, V], ``Chunk.num_sampled`` rows of each chunk, in order; bias and penalties
                are written into them.
            chunks: those of sequences of one kind together.
            masks: of each row, the tokens that a grammar allows; None if there is none.

        Returns:
            Token ids, ``NOT_FINITE`` where a row has a NaN or no finite maximum; and for each its
            log-probability, None where it isn't asked for.
        """
        # Of each row, its sequence and how many guesses lie before it.
        places = [(chunk, ahead) for chunk in chunks for ahead in range(chunk.num_sampled)]
        params = [chunk.seq.params for chunk, _ in places]
        scored = [i for i, of_row in enumerate(params) if of_row.logprobs]
        untouched = logits[scored] if scored else logits[:0]
        for i, (chunk, ahead) in enumerate(places):
            if chunk.seq.edited:
                with guessed(chunk.seq, chunk.draft[:ahead]):
                    edit(logits[i], chunk.seq, self._eos_token_ids, ahead)
            if masks is not None and chunk.seq.matcher is not None:
                forbid(logits[i], masks[i])
        numbers = [
            0.0
            if chunk.seq.params.greedy
            else uniform(chunk.seq.seed, chunk.seq.sample, chunk.seq.draw_index + ahead)
            for chunk, ahead in places
        ]
        tokens = self._kernels.choose(logits, params, numbers)
        logprobs: list[TokenLogprob | None] = [None] * len(places)
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


@contextmanager
def guessed(seq: Sequence, draft: Seq[int]) -> Iterator[None]:
    """Count guesses as tokens of a sequence's completion, for a while."""
    if seq.counts is None or not draft:
        yield
        return
    for token_id in draft:
        seq.counts.add(token_id)
    try:
        yield
    finally:
        for token_id in reversed(draft):
            seq.counts.remove(token_id)


def edit(row: Logits, seq: Sequence, eos_token_ids: Collection[int], ahead: int = 0) -> None:
    """Bias, penalties and the least length, written into a row of logits [V].

    The order, and what each means, is told by ``SamplingParams``. ``ahead`` tokens are guessed
    beyond those that the sequence has.
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
    if seq.num_completion_tokens + ahead < params.min_tokens:
        row[[i for i in end_token_ids(seq, eos_token_ids) if i < len(row)]] = -np.inf
