"""The arrays of one step, built into buffers that are allocated once.

Shape letters are those of ``llama_runtime.contract``.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama_runtime.chunk import Chunk
from llama_runtime.contract import MAX_CELLS, MAX_ROW_MULTIPLE, max_logits_rows

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Step:
    """The inputs of one forward, by the contract's names; valid until the next one is built.

    Attributes:
        first_slot: the slot that the first of the B rows is; the others follow it.
        num_logits: rows of the logits that are sampled from, ``Chunk.num_sampled`` of each chunk,
            in order.
        num_scored: rows after them that score the tokens of prompts, in order of the chunks; what
            follows pads R.
        chunks: what the rows are.
    """

    input_ids: Int64s  # [N]
    logits_rows: Int64s  # [R]
    unpack: Int64s  # [B, S]
    pack: Int64s  # [N]
    seqlens_k: Int32s  # [B]
    query_seqlens: Int32s  # [B]
    total_sequence_length: Int32s  # []
    first_slot: int
    num_logits: int
    num_scored: int
    chunks: Seq[Chunk]


class StepBatch:
    """Builds steps.

    Args:
        num_slots: all slots of the cache.
        prompt_budget: the most prompt tokens of a step.
        row_multiple: N and R are padded to multiples of it; see ``Backend``.
    """

    def __init__(
        self,
        num_slots: int,
        prompt_budget: int,
        row_multiple: int = MAX_ROW_MULTIPLE,
    ) -> None:
        self._row_multiple = row_multiple
        most_logits = max_logits_rows(num_slots)  # so many tokens has a step that verifies
        num_rows = padded(max(prompt_budget, most_logits), row_multiple)
        self._input_ids = np.zeros(num_rows, np.int64)
        self._pack = np.zeros(num_rows, np.int64)
        self._logits_rows = np.zeros(padded(most_logits, row_multiple), np.int64)
        self._unpack = np.zeros(max(num_slots, MAX_CELLS), np.int64)
        self._seqlens_k = np.zeros(num_slots, np.int32)
        self._query_seqlens = np.zeros(num_slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._columns = np.arange(num_rows, dtype=np.int64)

    def build(self, chunks: Seq[Chunk]) -> Step:
        """The arrays that run the given chunks, of which there is at least one.

        A step that decodes covers all slots, so that its shapes are few. Another one covers those
        from the lowest to the highest in it, because each costs as many cells as the longest chunk.
        One that verifies has two columns at least, so that it is the same kernel whether anything
        is guessed or not. A slot without a chunk is inactive. Padded cells and dummy rows read row
        0; they write no cache and their results are dropped.
        """
        slots, starts, counts = np.array([_place(chunk) for chunk in chunks]).T
        width, first, num_slots = int(counts.max()), 0, len(self._seqlens_k)
        if any(chunk.seq.lookup is not None for chunk in chunks):
            width = max(width, 2)
        if width > 1:
            first = int(slots.min())
            num_slots = int(slots.max()) - first + 1
            slots = slots - first
        seqlens_k, query_seqlens = self._seqlens_k[:num_slots], self._query_seqlens[:num_slots]
        seqlens_k.fill(0)
        query_seqlens.fill(0)
        seqlens_k[slots] = starts + counts - 1
        query_seqlens[slots] = counts

        ends = counts.cumsum()
        num_tokens = int(ends[-1])
        num_rows = padded(num_tokens, self._row_multiple)
        rows = self._columns[:num_tokens]
        # From a token's packed row to its cell, which lies as far behind in all of a chunk.
        cells = rows + np.repeat(slots * width - (ends - counts), counts)
        pack, input_ids = self._pack[:num_rows], self._input_ids[:num_rows]
        pack[:num_tokens] = cells
        pack[num_tokens:] = cells[0]
        input_ids[:num_tokens] = [token_id for chunk in chunks for token_id in _token_ids(chunk)]
        input_ids[num_tokens:] = input_ids[0]
        unpack = self._unpack[: num_slots * width]
        unpack.fill(0)
        unpack[cells] = rows

        sampled = [
            row
            for chunk, end in zip(chunks, ends.tolist(), strict=True)
            for row in range(end - chunk.num_sampled, end)
        ]
        scored = [
            row
            for chunk, start in zip(chunks, (ends - counts).tolist(), strict=True)
            for row in range(start, start + chunk.num_scored)
        ]
        num_heads = padded(len(sampled) + len(scored), self._row_multiple)
        logits_rows = self._logits_rows[:num_heads]
        logits_rows.fill(0)
        logits_rows[: len(sampled) + len(scored)] = sampled + scored
        # One token in two columns: attention wants no fewer than there are columns.
        self._total[...] = max(int(seqlens_k.max()) + 1, width)
        return Step(
            input_ids=input_ids,
            logits_rows=logits_rows,
            unpack=unpack.reshape(num_slots, width),
            pack=pack,
            seqlens_k=seqlens_k,
            query_seqlens=query_seqlens,
            total_sequence_length=self._total,
            first_slot=first,
            num_logits=len(sampled),
            num_scored=len(scored),
            chunks=chunks,
        )


def _place(chunk: Chunk) -> tuple[int, int, int]:
    """Slot, tokens that are there before, and tokens that come."""
    seq = chunk.seq
    if seq.slot is None:
        raise RuntimeError(f"sequence {seq.id} was scheduled without a slot")
    return seq.slot, seq.cache_len, chunk.num_tokens


def _token_ids(chunk: Chunk) -> list[int]:
    start = chunk.seq.cache_len
    return [*chunk.seq.token_ids[start : start + chunk.num_tokens - len(chunk.draft)], *chunk.draft]


def padded(count: int, multiple: int) -> int:
    """The least multiple that is no smaller than a count."""
    return -(-count // multiple) * multiple
