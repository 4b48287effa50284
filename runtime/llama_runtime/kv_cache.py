"""The key and value cache of the ``slots`` dialect: one row of one buffer for each sequence."""

from __future__ import annotations

import heapq
import mmap
import sys
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.contract import DType, Geometry
from llama_runtime.prefix_store import PrefixStore
from llama_runtime.sequence import Sequence


class SlotCache:
    """Who owns which slot.

    Invariants, executable in ``check``: every slot is either free or owned by one sequence, which
    names it; no sequence holds more tokens than fit; and those of ``PrefixStore``.

    Args:
        num_slots: B, sequences that can run at once.
        max_len: the most tokens of one sequence.
        prefixes: what is kept of prompts for others; None keeps nothing.

    Attributes:
        num_reused_tokens: prompt tokens that needn't be computed, since the start.
        num_prefix_hits: sequences that were spared some.
    """

    def __init__(self, num_slots: int, max_len: int, prefixes: PrefixStore | None = None) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.num_reused_tokens = self.num_prefix_hits = 0
        self._prefixes = prefixes
        self._free = list(range(num_slots))  # a heap: the lowest slot is handed out first
        self._owners: dict[int, Sequence] = {}

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def use(self) -> float:
        """How much of it is held, 0 to 1: all of a slot is, however long its sequence is."""
        return 1 - len(self._free) / self.num_slots

    def fits(self, seq: Sequence) -> bool:  # noqa: ARG002  one slot is as good as another
        """Whether ``allocate`` would have room."""
        return bool(self._free)

    def reuse(self, seq: Sequence) -> None:
        """Move ``seq.cache_len`` over what others have computed of its prompt by now."""
        if self._prefixes is not None:
            num_tokens = self._prefixes.reuse(seq)
            self.num_reused_tokens += num_tokens
            self.num_prefix_hits += seq.num_reused == 0 < num_tokens
            seq.num_reused += num_tokens

    def next_block(self, seq: Sequence) -> bytes | None:
        """What identifies the block that ``seq`` computes next; None if nobody could reuse it."""
        return self._prefixes.next_block(seq) if self._prefixes is not None else None

    def computed(self, seq: Sequence) -> None:
        """Learn that the slot holds what is in the cache up to ``seq.cache_len``."""
        if self._prefixes is not None:
            self._prefixes.computed(seq)

    def forget(self, seq: Sequence) -> None:
        """Let nobody share what a sequence wrote."""
        if self._prefixes is not None:
            self._prefixes.forget(seq)

    def allocate(self, seq: Sequence) -> None:
        """Give the lowest free slot to a sequence; one must be free."""
        slot = heapq.heappop(self._free)
        seq.slot = slot
        seq.cache_len = 0
        self._owners[slot] = seq

    def free(self, seq: Sequence) -> None:
        """Take a sequence's slot back."""
        if seq.slot is None or self._owners.get(seq.slot) is not seq:
            raise RuntimeError(f"sequence {seq.id} does not hold slot {seq.slot}")
        if self._prefixes is not None:
            self._prefixes.release(seq)
        del self._owners[seq.slot]
        heapq.heappush(self._free, seq.slot)
        seq.slot = None

    def check(self) -> None:
        """Raise if slots and owners don't balance.

        Raises:
            RuntimeError: an invariant is broken, which is a defect of Caravan.
        """
        slots = sorted([*self._free, *self._owners])
        if slots != list(range(self.num_slots)):
            raise RuntimeError(f"slots don't balance: free {self._free}, owned {self._owners}")
        for slot, seq in self._owners.items():
            most = min(seq.num_tokens + seq.num_pending, self.max_len)
            if seq.slot != slot or not 0 <= seq.cache_len <= most:
                raise RuntimeError(f"slot {slot} is out of step with sequence {seq.id}")
        if self._prefixes is not None:
            self._prefixes.check()


def cache_buffers(
    geometry: Geometry, num_slots: int, capacity: int, dtype: DType = "float32"
) -> list[npt.NDArray[Any]]:
    """Zero buffers [B, K, C, D], keys then values of each layer, that cost what is touched.

    A zero byte is 0 in int8 too, which has no zero point. numpy's own zeros take huge pages where
    the system offers them, and then a few short sequences make most of the buffer resident; here
    only the small pages that hold tokens are.
    """
    shape = (num_slots, geometry.num_kv_heads, capacity, geometry.head_dim)
    buffers = []
    for _ in range(2 * geometry.num_layers):
        pages = _private_pages(prod(shape) * np.dtype(dtype).itemsize)
        buffers.append(np.frombuffer(pages, dtype=dtype).reshape(shape))
    return buffers


def _private_pages(num_bytes: int) -> mmap.mmap:
    """Zero memory of this process alone: Python's default is shared, and keeps freed pages."""
    if sys.platform == "win32":
        pages = mmap.mmap(-1, num_bytes)
    else:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
