"""Which tokens grammars allow in a step on a CUDA device, found out while its graph runs there."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np

from llama_runtime.backends.cuda_device import Device
from llama_runtime.chunk import Chunk
from llama_runtime.grammar_masks import MaskFiller, Masks, mask_words
from llama_runtime.host_masks import grammar_rows
from llama_runtime.machine import default_threads

MAX_THREADS = 8  # with a row each some microseconds, more wait for each other


class CudaMasks:
    """Masks of the rows of a step, in pinned memory and on the device.

    There is one set: a step whose masks are read has ended before the next one that has any.

    Args:
        device: where the logits are.
        vocab_size: V.
        max_rows: the most rows that are sampled in a step.

    Attributes:
        address: of uint32 [max_rows, ceil(V / 32)] on the device; 0 until a step has a grammar.
    """

    def __init__(self, device: Device, vocab_size: int, max_rows: int) -> None:
        self._device = device
        self._filler = MaskFiller(min(default_threads(), MAX_THREADS))
        self._shape = max_rows, mask_words(vocab_size)
        self._masks: Masks = np.zeros((0, 0), np.int32)
        self.address = 0

    def queue(self, chunks: Seq[Chunk]) -> None:
        """Compute the masks of a step whose graph has been queued, and queue their upload."""
        rows = grammar_rows(chunks)
        if not rows:
            return
        if not self.address:
            size = 4 * math.prod(self._shape)
            self._masks = self._device.pinned(size)[:size].view(np.int32).reshape(self._shape)
            self.address = self._device.allocate(size, zero=False)
        first, last = rows[0][0], rows[-1][0]
        self._masks[first : last + 1] = -1
        self._filler.fill(rows, self._masks)
        place = self.address + first * self._masks.shape[1] * self._masks.itemsize
        self._device.upload(place, self._masks[first : last + 1])
