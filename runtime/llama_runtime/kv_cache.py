"""The key and value cache of the ``slots`` dialect: one row of one buffer for each sequence."""

from __future__ import annotations

import heapq
import mmap
import sys
from math import prod

import numpy as np
import numpy.typing as npt

from llama_runtime.contract import Geometry
from llama_runtime.sequence import Sequence


class SlotCache:
    """Who owns which slot.

    Invariants, executable in ``check``: every slot is either free or owned by one sequence, which
    names it; no sequence holds more tokens than fit.

    Args:
        num_slots: B, sequences that can run at once.
        max_len: the most tokens of one sequence.
    """

    def __init__(self, num_slots: int, max_len: int) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self._free = list(range(num_slots))  # a heap: the lowest slot is handed out first
        self._owners: dict[int, Sequence] = {}

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    def fits(self, seq: Sequence) -> bool:  # noqa: ARG002  one slot is as good as another
        """Whether ``allocate`` would have room."""
        return bool(self._free)

    def computed(self, seq: Sequence) -> None:
        """Nothing: the tokens of a slot are its sequence's own."""

    def forget(self, seq: Sequence) -> None:
        """Nothing, for the same reason."""

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


def cache_buffers(
    geometry: Geometry, num_slots: int, capacity: int
) -> list[npt.NDArray[np.float32]]:
    """Zero buffers [B, K, C, D], keys then values of each layer, that cost what is touched.

    numpy's own zeros take huge pages where the system offers them, and then a few short sequences
    make most of the buffer resident; here only the small pages that hold tokens are.
    """
    shape = (num_slots, geometry.num_kv_heads, capacity, geometry.head_dim)
    buffers = []
    for _ in range(2 * geometry.num_layers):
        pages = _private_pages(prod(shape) * np.dtype(np.float32).itemsize)
        buffers.append(np.frombuffer(pages, dtype=np.float32).reshape(shape))
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
