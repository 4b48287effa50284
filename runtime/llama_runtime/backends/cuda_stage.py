"""What the steps of a CUDA device keep in host memory, and what becomes of it when one is over."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

import numpy as np

from llama_runtime.backends.base import Outcome
from llama_runtime.backends.cuda_device import Device
from llama_runtime.chunk import Chunk
from llama_runtime.contract import MAX_TOP_LOGPROBS
from llama_runtime.sequence import TokenLogprob

STAGES = 3  # steps whose host memory is in use: planned, running, read


class StepSizes(Protocol):
    """The sizes of a step, whatever its dialect."""

    @property
    def num_logits(self) -> int:
        """R."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all its arrays together."""


class StepRows(Protocol):
    """Whose the rows of a step's logits are, whatever its dialect."""

    @property
    def num_sampled(self) -> int:
        """Rows that are sampled from, the first ones: one of each chunk that samples, in order."""

    @property
    def scored(self) -> list[int]:
        """Rows after them that score tokens of prompts: for each, the token."""

    @property
    def chunks(self) -> Seq[Chunk]:
        """What runs."""


class Stage:
    """Host memory of one step: its arrays on the way out, its tokens on the way back."""

    def __init__(self, device: Device, largest: StepSizes) -> None:
        rows, tops = largest.num_logits, largest.num_logits * MAX_TOP_LOGPROBS
        self.memory = device.pinned(largest.num_bytes)
        self.tokens = device.pinned(4 * rows).view(np.int32)
        self.logprobs = device.pinned(8 * rows).view(np.float64)
        self.top_tokens = device.pinned(4 * tops).view(np.int32)
        self.top_logprobs = device.pinned(8 * tops).view(np.float64)
        self.event = device.event()


class InFlight:
    """See ``Launched``."""

    def __init__(
        self, device: Device, stage: Stage, step: StepRows, num_top: int, *, is_scored: bool
    ) -> None:
        self._device = device
        self._stage = stage
        self._num_top = num_top
        self._num_sampled = step.num_sampled
        self._is_scored = is_scored
        if not is_scored:
            return
        self._chunks = step.chunks
        # What follows from the state of sequences now, before it moves on.
        self._num_scored = [chunk.num_scored for chunk in step.chunks]
        self._first = [
            chunk.seq.params.prompt_logprobs and chunk.seq.cache_len == 0 for chunk in step.chunks
        ]
        self._scored = step.scored
        self._asked = [
            chunk.seq.params.top_logprobs if chunk.seq.params.logprobs else None
            for chunk in step.chunks
            if chunk.samples
        ]

    @property
    def ready(self) -> bool:
        """See ``Launched.ready``."""
        return self._device.passed(self._stage.event)

    def result(self) -> Outcome:
        """See ``Launched.result``."""
        self._device.wait(self._stage.event)
        tokens = self._stage.tokens[: self._num_sampled].tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        prompt: list[list[TokenLogprob | None]] = []
        if not self._is_scored:
            return Outcome(tokens, logprobs, prompt)
        place = 0
        for i, num_top in enumerate(self._asked):
            if num_top is not None:
                logprobs[i] = self._logprob(place, tokens[i], num_top)
                place += 1
        following = iter(self._scored)
        for chunk, first, count in zip(self._chunks, self._first, self._num_scored, strict=True):
            prompt.append([None] if first else [])
            for _ in range(count):
                num_top = chunk.seq.params.top_logprobs
                prompt[-1].append(self._logprob(place, next(following), num_top))
                place += 1
        return Outcome(tokens, logprobs, prompt)

    def _logprob(self, place: int, token_id: int, num_top: int) -> TokenLogprob:
        begin = place * self._num_top
        top = zip(
            self._stage.top_tokens[begin : begin + num_top].tolist(),
            self._stage.top_logprobs[begin : begin + num_top].tolist(),
            strict=True,
        )
        return TokenLogprob(token_id, float(self._stage.logprobs[place]), tuple(top))
