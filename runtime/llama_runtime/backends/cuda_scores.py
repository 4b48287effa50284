"""Log-probabilities of a step on a CUDA device: what is scored, and the memory that it takes."""

from __future__ import annotations

import numpy as np

from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.cuda_sampler import CudaSampler
from llama_runtime.backends.cuda_stage import Stage, StepRows
from llama_runtime.contract import MAX_TOP_LOGPROBS


class CudaScores:
    """Device memory of what ``CudaSampler.score`` reads and writes.

    Args:
        device: where the logits are.
        sampler: whose kernel it is.
        logits: address of the logits of every step.
        max_rows: the most rows of them.
    """

    def __init__(self, device: Device, sampler: CudaSampler, logits: int, max_rows: int) -> None:
        self._device = device
        self._sampler = sampler
        self._logits = logits
        self._rows = device.allocate(4 * max_rows)
        self._wanted = device.allocate(4 * max_rows)
        sizes = (8 * max_rows, 4 * max_rows * MAX_TOP_LOGPROBS, 8 * max_rows * MAX_TOP_LOGPROBS)
        self._results = [device.allocate(size) for size in sizes]

    def queue(self, step: StepRows, stage: Stage) -> int:
        """Queue what the log-probabilities of a step need; returns how many likeliest ones."""
        sampling = [chunk for chunk in step.chunks if chunk.samples]
        wanting = [i for i, chunk in enumerate(sampling) if chunk.seq.params.logprobs]
        rows = [*wanting, *range(step.num_sampled, step.num_sampled + len(step.scored))]
        if not rows:
            return 0
        num_top = max(
            chunk.seq.params.top_logprobs
            for chunk in step.chunks
            if chunk.num_scored or (chunk.samples and chunk.seq.params.logprobs)
        )
        wanted = [-1] * len(wanting) + step.scored
        self._device.upload(self._rows, np.array(rows, np.int32))
        self._device.upload(self._wanted, np.array(wanted, np.int32))
        self._sampler.score(
            self._logits, self._rows, self._wanted, len(rows), num_top, self._results
        )
        self._device.download(stage.logprobs[: len(rows)], self._results[0])
        if num_top:
            self._device.download(stage.top_tokens[: len(rows) * num_top], self._results[1])
            self._device.download(stage.top_logprobs[: len(rows) * num_top], self._results[2])
        return num_top
