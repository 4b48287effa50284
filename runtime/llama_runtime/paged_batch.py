"""The arrays of one step in the ``paged`` dialect, packed into one piece of memory.

Shape letters are those of ``llama_runtime.contract``.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.chunk import Chunk
from llama_runtime.contract import max_logits_rows
from llama_runtime.paged_cache import PagedCache
from llama_runtime.sequence import Sequence
from llama_runtime.step_arrays import (
    ROW,
    Bytes,
    Shapes,
    StepArrays,
    given_tokens,
    row_buckets,
    row_of,
)

Int32s = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Layout(StepArrays):
    """Sizes of a step and the places of its arrays.

    Attributes:
        num_rows: B, padded.
        num_tokens: N, padded.
        num_logits: R, padded.
        num_columns: P.
    """

    num_rows: int
    num_tokens: int
    num_logits: int
    num_columns: int

    @property
    def shapes(self) -> Shapes:
        """See ``StepArrays.shapes``."""
        return {
            "logits_rows": (np.dtype("i8"), (self.num_logits,)),
            "rows": (ROW, (self.num_logits,)),
            "cumulative_sequence_length": (np.dtype("i4"), (self.num_rows + 1,)),
            "past_seqlens": (np.dtype("i4"), (self.num_rows,)),
            "given": (np.dtype("i4"), (self.num_tokens,)),
            "slot_mapping": (np.dtype("i4"), (self.num_tokens,)),
            "block_table": (np.dtype("i4"), (self.num_rows, self.num_columns)),
        }


@dataclass(frozen=True, slots=True)
class PagedStep:
    """One step, its arrays in the memory that ``PagedBatch.build`` was given.

    Attributes:
        layout: its sizes.
        decodes: whether it is one token of each row, all of which sample.
        num_sampled: rows of logits that are sampled from, the first ones.
        scored: rows after them that score tokens of prompts: for each, the token.
        metadata: int32 [3], ``attention_metadata``.
        chunks: what the rows are.
    """

    layout: Layout
    decodes: bool
    num_sampled: int
    scored: list[int]
    metadata: Int32s
    chunks: Seq[Chunk]


class PagedBatch:
    """Builds steps.

    Steps that decode come in few sizes, so that each can be captured once: rows and columns of the
    block table are rounded up. Padded rows write nowhere, sample nothing and belong to nobody.

    Args:
        cache: whose tables they use.
        prompt_budget: the most prompt tokens of a step.
        vocab_size: V.
    """

    def __init__(self, cache: PagedCache, prompt_budget: int, vocab_size: int) -> None:
        self._cache = cache
        self._vocab_size = vocab_size
        self.row_buckets = row_buckets(cache.num_slots)
        self.max_columns = -(-cache.max_len // cache.block_size)
        self.largest = Layout(
            self.row_buckets[-1],
            max(self.row_buckets[-1], prompt_budget),
            max(self.row_buckets[-1], max_logits_rows(cache.num_slots)),
            column_bucket(self.max_columns),
        )
        # By slot, written when a sequence first runs there, and when blocks of it were exchanged.
        self._tables = np.zeros((cache.num_slots, self.largest.num_columns), np.int32)
        self._rows = np.zeros(cache.num_slots, ROW)
        self._known: list[list[int] | None] = [None] * cache.num_slots  # what was written
        self._layouts: dict[tuple[int, int], Layout] = {}

    def build(self, chunks: Seq[Chunk], memory: Bytes) -> PagedStep:
        """Write the arrays that run the given chunks, of which there is at least one."""
        slots = np.array([self._slot(chunk.seq) for chunk in chunks], np.int32)
        starts = np.array([chunk.seq.cache_len for chunk in chunks], np.int32)
        counts = np.array([chunk.num_tokens for chunk in chunks], np.int32)
        totals = starts + counts
        longest = int(totals.max())
        columns = column_bucket(-(-longest // self._cache.block_size))
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples]
        decodes = int(counts.max()) == 1 and len(sampling) == len(chunks)
        if decodes:
            return self._decode(chunks, slots, starts, columns, memory)
        scored = [token for chunk in chunks for token in _following(chunk)]
        num_tokens = int(counts.sum())
        num_logits = max(1, len(sampling) + len(scored))  # kernels take no empty product
        layout = Layout(len(chunks), num_tokens, num_logits, columns)
        views = layout.views(memory)
        ends = counts.cumsum()
        views["cumulative_sequence_length"][0] = 0
        views["cumulative_sequence_length"][1:] = ends
        views["past_seqlens"][:] = starts
        views["block_table"][:] = self._tables[slots, :columns]
        views["given"][:] = [token for chunk in chunks for token in given_tokens(chunk)]
        owner = np.repeat(np.arange(len(chunks)), counts)
        positions = (np.arange(num_tokens) + (starts - (ends - counts))[owner]).astype(np.int32)
        views["slot_mapping"][:] = self._cells(slots[owner], positions)
        begins = (ends - counts).tolist()
        logits_rows = [int(ends[i]) - 1 for i in sampling] + [
            row
            for chunk, begin in zip(chunks, begins, strict=True)
            for row in range(begin, begin + chunk.num_scored)
        ]
        views["logits_rows"][:] = logits_rows or [0]
        views["rows"]["slot"] = -1
        self._write_rows(views["rows"][: len(sampling)], [chunks[i].seq for i in sampling])
        metadata = np.array([counts.max(), longest, totals.min()], np.int32)
        return PagedStep(layout, False, len(sampling), scored, metadata, chunks)

    def _decode(
        self, chunks: Seq[Chunk], slots: Int32s, starts: Int32s, columns: int, memory: Bytes
    ) -> PagedStep:
        count = len(chunks)
        layout = self.decode_layout(count, columns)
        views = layout.views(memory)
        views["logits_rows"][:] = np.arange(layout.num_logits)
        views["cumulative_sequence_length"][:] = np.arange(layout.num_rows + 1)
        views["past_seqlens"][:count] = starts
        views["past_seqlens"][count:] = 0
        views["given"][:count] = [_newest(chunk.seq) for chunk in chunks]
        views["given"][count:] = 0
        views["slot_mapping"][:count] = self._cells(slots, starts)
        views["slot_mapping"][count:] = -1
        views["block_table"][:count] = self._tables[slots, :columns]
        views["block_table"][count:] = 0
        views["rows"]["slot"] = -1
        self._write_rows(views["rows"][:count], [chunk.seq for chunk in chunks])
        return PagedStep(layout, True, count, [], self.decode_metadata(layout), chunks)

    def decode_layout(self, count: int, columns: int) -> Layout:
        """The sizes of a step that decodes ``count`` rows."""
        rows = next(rows for rows in self.row_buckets if rows >= count)
        if (rows, columns) not in self._layouts:
            self._layouts[rows, columns] = Layout(rows, rows, rows, columns)
        return self._layouts[rows, columns]

    def decode_metadata(self, layout: Layout) -> Int32s:
        """Bounds that hold for every step of these sizes: a captured one keeps those it saw."""
        return np.array([1, layout.num_columns * self._cache.block_size, 1], np.int32)

    def _slot(self, seq: Sequence) -> int:
        """The slot of a sequence, whose table and parameters are known from here on."""
        if seq.slot is None:
            raise RuntimeError(f"sequence {seq.id} was scheduled without a slot")
        blocks = self._cache.table(seq)
        if self._known[seq.slot] is not blocks:
            self._tables[seq.slot] = 0
            self._tables[seq.slot, : len(blocks)] = blocks
            self._rows[seq.slot] = row_of(seq, self._vocab_size)
            self._known[seq.slot] = blocks
        return seq.slot

    def _cells(self, slots: Int32s, positions: npt.NDArray[np.integer]) -> Int32s:
        block, inside = np.divmod(positions, self._cache.block_size)
        cells: Int32s = self._tables[slots, block] * self._cache.block_size + inside
        return cells

    def _write_rows(self, rows: npt.NDArray[Any], seqs: Seq[Sequence]) -> None:
        if seqs:
            rows[:] = self._rows[[seq.slot or 0 for seq in seqs]]
            rows["index"] = [seq.draw_index for seq in seqs]


def column_bucket(columns: int) -> int:
    """How many columns the block table of a step is padded to: a power of two."""
    return 1 << (columns - 1).bit_length()


def _newest(seq: Sequence) -> int:
    """The token that a sequence decodes; -1 - slot if only the device knows it."""
    tokens, place = seq.token_ids, seq.cache_len
    return tokens[place] if place < len(tokens) else -1 - (seq.slot or 0)


def _following(chunk: Chunk) -> list[int]:
    """The prompt's tokens that the first rows of a chunk score."""
    first = chunk.seq.cache_len + 1
    return chunk.seq.token_ids[first : first + chunk.num_scored]
