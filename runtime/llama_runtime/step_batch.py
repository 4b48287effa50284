"""The arrays of one step, built into buffers that are allocated once.

Shape letters are those of ``llama_runtime.contract``.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llama_runtime.contract import MAX_ROW_MULTIPLE, MIN_WIDTH
from llama_runtime.scheduler import Chunk

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Step:
    """The inputs of one forward, by the contract's names; valid until the next one is built.

    Attributes:
        num_logits: rows of the logits that are real; the rest pads R.
        chunks: what the rows are; the i-th real row of the logits belongs to the i-th chunk
            that samples.
    """

    input_ids: Int64s  # [N]
    logits_rows: Int64s  # [R]
    unpack: Int64s  # [B, S]
    pack: Int64s  # [N]
    seqlens_k: Int32s  # [B]
    query_seqlens: Int32s  # [B]
    total_sequence_length: Int32s  # []
    num_logits: int
    chunks: Seq[Chunk]


class StepBatch:
    """Builds steps.

    Args:
        num_slots: B.
        token_budget: the most tokens of a step.
        max_chunk: the most tokens of one sequence in a step.
        row_multiple: N and R are padded to multiples of it; see ``Backend``.
    """

    def __init__(
        self,
        num_slots: int,
        token_budget: int,
        max_chunk: int,
        row_multiple: int = MAX_ROW_MULTIPLE,
    ) -> None:
        self._row_multiple = row_multiple
        num_rows = padded(token_budget, row_multiple)
        self._input_ids = np.zeros(num_rows, np.int64)
        self._pack = np.zeros(num_rows, np.int64)
        self._logits_rows = np.zeros(padded(num_slots, row_multiple), np.int64)
        self._unpack = np.zeros(num_slots * max(MIN_WIDTH, max_chunk), np.int64)
        self._seqlens_k = np.zeros(num_slots, np.int32)
        self._query_seqlens = np.zeros(num_slots, np.int32)
        self._total = np.zeros((), np.int32)
        self._columns = np.arange(num_rows, dtype=np.int64)

    def build(self, chunks: Seq[Chunk]) -> Step:
        """The arrays that run the given chunks, of which there is at least one.

        A slot without a chunk is inactive. Padded cells and dummy rows read row 0; they write no
        cache and their results are dropped.
        """
        width = max(MIN_WIDTH, max(chunk.num_tokens for chunk in chunks))
        num_slots = len(self._seqlens_k)
        unpack = self._unpack[: num_slots * width].reshape(num_slots, width)
        unpack.fill(0)
        self._seqlens_k.fill(0)
        self._query_seqlens.fill(0)
        row = num_logits = 0
        for chunk in chunks:
            seq, count = chunk.seq, chunk.num_tokens
            slot, start = seq.slot, seq.cache_len
            if slot is None:
                raise RuntimeError(f"sequence {seq.id} was scheduled without a slot")
            end = row + count
            self._input_ids[row:end] = seq.token_ids[start : start + count]
            self._pack[row:end] = self._columns[:count] + slot * width
            unpack[slot, :count] = self._columns[row:end]
            self._seqlens_k[slot] = start + count - 1
            self._query_seqlens[slot] = count
            if chunk.samples:
                self._logits_rows[num_logits] = end - 1
                num_logits += 1
            row = end
        num_rows = padded(row, self._row_multiple)
        num_heads = padded(num_logits, self._row_multiple)
        self._input_ids[row:num_rows] = self._input_ids[0]
        self._pack[row:num_rows] = self._pack[0]
        self._logits_rows[num_logits:num_heads] = 0
        self._total[...] = max(width, self._seqlens_k.max() + 1)  # the operator insists on S
        return Step(
            input_ids=self._input_ids[:num_rows],
            logits_rows=self._logits_rows[:num_heads],
            unpack=unpack,
            pack=self._pack[:num_rows],
            seqlens_k=self._seqlens_k,
            query_seqlens=self._query_seqlens,
            total_sequence_length=self._total,
            num_logits=num_logits,
            chunks=chunks,
        )


def padded(count: int, multiple: int) -> int:
    """The least multiple that is no smaller than a count."""
    return -(-count // multiple) * multiple
