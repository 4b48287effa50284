"""A backend without a model, for tests and load tests of everything around the graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_runtime.contract import CHUNK_MULTIPLE, MAX_ROW_MULTIPLE
from llama_runtime.errors import BackendError
from llama_runtime.step_batch import Step

_MULTIPLIER = np.uint64(6364136223846793005)  # of Knuth's MMIX generator
_INCREMENT = np.uint64(1442695040888963407)


class Fake:
    """Deterministic logits that depend on every token of a sequence and on nothing else.

    It keeps the token ids where a model would keep keys and values, reads the step's arrays as
    attention does, and derives a row of logits from the tokens it finds in the cache. So a wrong
    position, a stale length or a swapped slot changes what is generated.

    Args:
        num_slots: B.
        capacity: C.
        vocab_size: V.
        num_prefix_blocks: blocks that are kept outside the slots.
    """

    row_multiple = MAX_ROW_MULTIPLE

    def __init__(
        self, num_slots: int, capacity: int, vocab_size: int, *, num_prefix_blocks: int = 0
    ) -> None:
        self._cache = np.full((num_slots, capacity), -1, np.int64)
        self._blocks = np.full((num_prefix_blocks, CHUNK_MULTIPLE), -1, np.int64)
        self._noise = np.random.default_rng(0).standard_normal(2 * vocab_size).astype(np.float32)
        self._vocab_size = vocab_size

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        rows_of_cells = step.unpack
        width = rows_of_cells.shape[1]
        history = np.zeros(len(step.input_ids), np.int64)
        for i in np.flatnonzero(step.query_seqlens):
            slot = step.first_slot + i
            count, total = int(step.query_seqlens[i]), int(step.seqlens_k[i]) + 1
            past = total - count
            if (
                past < 0
                or past + width > self._cache.shape[1]
                or total > step.total_sequence_length
            ):
                raise BackendError(f"slot {slot}: {count} of {total} tokens do not fit the cache")
            rows = rows_of_cells[i, :count]
            if not np.array_equal(step.pack[rows], i * width + np.arange(count)):
                raise BackendError(f"slot {slot}: pack is not the inverse of unpack")
            self._cache[slot, past:total] = step.input_ids[rows]
            history[rows] = [digest(self._cache[slot, : past + i + 1]) for i in range(count)]
        starts = history[step.logits_rows] % self._vocab_size
        logits: npt.NDArray[np.float32] = self._noise[starts[:, None] + np.arange(self._vocab_size)]
        return logits

    def clean(self, slot: int, num_tokens: int) -> None:
        """See ``Backend.clean``."""
        self._cache[slot, :num_tokens] = -1

    def save_block(self, slot: int, start: int, block: int) -> None:
        """See ``Backend.save_block``."""
        self._blocks[block] = self._cache[slot, start : start + CHUNK_MULTIPLE]

    def load_block(self, slot: int, start: int, block: int) -> None:
        """See ``Backend.load_block``."""
        self._cache[slot, start : start + CHUNK_MULTIPLE] = self._blocks[block]

    def close(self) -> None:
        """See ``Backend.close``."""


def digest(tokens: npt.NDArray[np.int64]) -> int:
    """A number that depends on every token and its place."""
    places = np.arange(1, len(tokens) + 1, dtype=np.uint64)
    mixed = (tokens.astype(np.uint64) + places * _INCREMENT) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    return int((mixed * _MULTIPLIER).sum(dtype=np.uint64) >> np.uint64(1))
