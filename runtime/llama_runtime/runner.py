"""Steps that run here and now: a backend's logits, sampled in this process."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from llama_runtime.backends.base import Backend, Outcome
from llama_runtime.chunk import Chunk
from llama_runtime.contract import MAX_DRAFT
from llama_runtime.host_masks import HostMasks
from llama_runtime.sampler import Sampler
from llama_runtime.sampling import Logits
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.step_batch import Step, StepBatch


class Done:
    """A step that has run; see ``Launched``."""

    ready = True

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def result(self) -> Outcome:
        """See ``Launched.result``."""
        return self._outcome


class HostRunner:
    """See ``Runner``.

    Args:
        backend: runs the graph; this owns and closes it.
        step_batch: makes its arrays.
        sampler: chooses tokens.
        masks: says which tokens grammars allow.
    """

    overlaps = False
    verifies = True

    def __init__(
        self, backend: Backend, step_batch: StepBatch, sampler: Sampler, masks: HostMasks
    ) -> None:
        self._backend = backend
        self._step_batch = step_batch
        self._sampler = sampler
        self._masks = masks

    def launch(self, chunks: Seq[Chunk]) -> Done:
        """See ``Runner.launch``; the step has run when it returns."""
        step = self._step_batch.build(chunks)
        with self._masks.computing(chunks) as masks:
            logits = self._backend.run(step)
        scored = self._score_prompts(step, logits)
        token_ids, logprobs = self._sampler.sample(logits[: step.num_logits], chunks, masks)
        return Done(Outcome(token_ids, logprobs, scored))

    def clean(self, seq: Sequence) -> None:
        """See ``Runner.clean``."""
        if seq.slot is not None:
            self._backend.clean(seq.slot, seq.num_tokens + MAX_DRAFT)

    def close(self) -> None:
        """See ``Runner.close``."""
        self._masks.close()
        self._backend.close()
        del self._sampler  # and its graph

    def _score_prompts(self, step: Step, logits: Logits) -> list[list[TokenLogprob | None]]:
        """For each chunk, the log-probabilities of the prompt's tokens that follow its rows."""
        scored: list[list[TokenLogprob | None]] = []
        first = step.num_logits
        for chunk in step.chunks:
            seq, count = chunk.seq, chunk.num_scored
            asked = seq.params.prompt_logprobs and seq.cache_len == 0
            scored.append([None] if asked else [])
            if count:
                following = seq.token_ids[seq.cache_len + 1 : seq.cache_len + 1 + count]
                rows = logits[first : first + count]
                tops = [seq.params.top_logprobs] * count
                scored[-1] += self._sampler.score(rows, np.array(following), tops)
                first += count
        return scored
