"""The arrays of one step, built into buffers that are allocated once.

Shape letters are those of ``llama_runtime.contract``.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama_runtime.contract import MAX_CELLS, MAX_ROW_MULTIPLE, max_logits_rows
from llama_runtime.scheduler import Chunk

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Step:
    """The inputs of one forward, by the contract's names; valid until the next one is built.

    Attributes:
        first_slot: the slot that the first of the B rows is; the others follow it.
        num_logits: rows of the logits that are sampled from; the i-th belongs to the i-th chunk
            that samples.
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
        num_rows = padded(max(num_slots, prompt_budget), row_multiple)
        self._input_ids = np.zeros(num_rows, np.int64)
        self._pack = np.zeros(num_rows, np.int64)
        self._logits_rows = np.zeros(padded(max_logits_rows(num_slots), row_multiple), np.int64)
        self._unpack = np.zeros(max(num_slots, MAX_CELLS), np.int64)
        self._seqlens_k = np.zeros(num_slots, np.int32)
        self._query_seqlens = np.zeros(num_slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._columns = np.arange(num_rows, dtype=np.int64)

    def build(self, chunks: Seq[Chunk]) -> Step:
        """The arrays that run the given chunks, of which there is at least one.

        A step that decodes covers all slots, so that its shapes are few. One of prompts covers
        those from the lowest to the highest in it, because each costs as many cells as the longest
        chunk. A slot without a chunk is inactive. Padded cells and dummy rows read row 0; they
        write no cache and their results are dropped.
        """
        width = max(chunk.num_tokens for chunk in chunks)
        slots = [_slot(chunk) for chunk in chunks]
        first, num_slots = 0, len(self._seqlens_k)
        if width > 1:
            first, num_slots = min(slots), max(slots) - min(slots) + 1
        unpack = self._unpack[: num_slots * width].reshape(num_slots, width)
        seqlens_k, query_seqlens = self._seqlens_k[:num_slots], self._query_seqlens[:num_slots]
        unpack.fill(0)
        seqlens_k.fill(0)
        query_seqlens.fill(0)
        row = num_logits = 0
        scored: list[int] = []
        for chunk, slot in zip(chunks, slots, strict=True):
            seq, count, start = chunk.seq, chunk.num_tokens, chunk.seq.cache_len
            slot -= first
            end = row + count
            self._input_ids[row:end] = seq.token_ids[start : start + count]
            self._pack[row:end] = self._columns[:count] + slot * width
            unpack[slot, :count] = self._columns[row:end]
            seqlens_k[slot] = start + count - 1
            query_seqlens[slot] = count
            if chunk.samples:
                self._logits_rows[num_logits] = end - 1
                num_logits += 1
            scored += range(row, row + chunk.num_scored)
            row = end
        num_rows = padded(row, self._row_multiple)
        self._logits_rows[num_logits : num_logits + len(scored)] = scored
        num_heads = padded(num_logits + len(scored), self._row_multiple)
        self._input_ids[row:num_rows] = self._input_ids[0]
        self._pack[row:num_rows] = self._pack[0]
        self._logits_rows[num_logits + len(scored) : num_heads] = 0
        self._total[...] = seqlens_k.max() + 1
        return Step(
            input_ids=self._input_ids[:num_rows],
            logits_rows=self._logits_rows[:num_heads],
            unpack=unpack,
            pack=self._pack[:num_rows],
            seqlens_k=seqlens_k,
            query_seqlens=query_seqlens,
            total_sequence_length=self._total,
            first_slot=first,
            num_logits=num_logits,
            num_scored=len(scored),
            chunks=chunks,
        )


def _slot(chunk: Chunk) -> int:
    if chunk.seq.slot is None:
        raise RuntimeError(f"sequence {chunk.seq.id} was scheduled without a slot")
    return chunk.seq.slot


def padded(count: int, multiple: int) -> int:
    """The least multiple that is no smaller than a count."""
    return -(-count // multiple) * multiple
