"""The arrays of one step in the ``tensorrt`` dialect, packed into one piece of memory.

A step either decodes, one token of each of the lowest slots, or runs one chunk of one prompt. Every
row is as wide as the step, so cells and packed tokens are the same: ``unpack`` and ``pack`` count
upwards. Shape letters are those of ``llama_runtime.contract``.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from llama_runtime.chunk import Chunk
from llama_runtime.errors import BackendError
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

ALIGNMENT = 256  # bytes, of every address that TensorRT is given


@dataclass(frozen=True)
class SlotLayout(StepArrays):
    """Sizes of a step and the places of its arrays.

    Attributes:
        num_rows: B.
        num_columns: S.
        num_logits: R.
    """

    alignment: ClassVar[int] = ALIGNMENT

    num_rows: int
    num_columns: int
    num_logits: int

    @property
    def num_tokens(self) -> int:
        """N: no row is narrower than the step."""
        return self.num_rows * self.num_columns

    @property
    def shapes(self) -> Shapes:
        """See ``StepArrays.shapes``."""
        return {
            "logits_rows": (np.dtype("i8"), (self.num_logits,)),
            "rows": (ROW, (self.num_logits,)),
            "unpack": (np.dtype("i8"), (self.num_rows, self.num_columns)),
            "pack": (np.dtype("i8"), (self.num_tokens,)),
            "past_lengths": (np.dtype("i8"), (self.num_rows,)),
            "given": (np.dtype("i4"), (self.num_tokens,)),
        }


@dataclass(frozen=True, slots=True)
class SlotStep:
    """One step, its arrays in the memory that ``SlotBatch.build`` was given.

    Attributes:
        layout: its sizes.
        slot: the slot of its only row, whose prompt it reads; None if it decodes, row by slot.
        num_sampled: rows of logits that are sampled from, the first ones.
        scored: rows after them that score tokens of the prompt: for each, the token.
        chunks: what runs.
    """

    layout: SlotLayout
    slot: int | None
    num_sampled: int
    scored: list[int]
    chunks: Seq[Chunk]


class SlotBatch:
    """Builds steps.

    Rows and slots are one when a step decodes, so it also runs the rows between: what isn't
    decoding gets token 0 behind its own tokens, in a cell that its next token overwrites, and
    nobody samples it. Which slots there are is rounded up, so that each size can be captured once.

    Args:
        num_slots: B, sequences that run at once.
        capacity: C, cells of a slot.
        max_chunk: the most prompt tokens of a step.
        max_logits: the most rows of logits of a step that reads a prompt.
        vocab_size: V.
    """

    def __init__(
        self, *, num_slots: int, capacity: int, max_chunk: int, max_logits: int, vocab_size: int
    ) -> None:
        self._capacity = capacity
        self._max_chunk = max_chunk
        self._max_logits = max_logits
        self._vocab_size = vocab_size
        self.row_buckets = row_buckets(num_slots)
        # By slot, written when a sequence first runs there.
        self._owners: list[Sequence | None] = [None] * num_slots
        self._rows = np.zeros(num_slots, ROW)
        decode = SlotLayout(num_slots, 1, num_slots)
        prompt = SlotLayout(1, max_chunk, max_logits)
        self.num_bytes = max(decode.num_bytes, prompt.num_bytes)  # of the largest step
        self.num_tokens = max(num_slots, max_chunk)
        self.num_logits = max(num_slots, max_logits)
        self._layouts = {rows: SlotLayout(rows, 1, rows) for rows in self.row_buckets}

    def build(self, chunks: Seq[Chunk], memory: Bytes) -> SlotStep:
        """Write the arrays that run the given chunks.

        Args:
            chunks: one of a prompt, or any that decode.
            memory: at least ``num_bytes``, aligned to ``ALIGNMENT``.

        Raises:
            BackendError: the engine has no room for them: TensorRT itself would drop what doesn't
                fit into the cache, and say nothing.
        """
        slots = [self._slot(chunk.seq) for chunk in chunks]
        if all(chunk.samples and chunk.num_tokens == 1 for chunk in chunks):
            return self._decode(chunks, slots, memory)
        if len(chunks) > 1:
            raise BackendError(f"a step reads one prompt, not {len(chunks)}")
        return self._prompt(chunks[0], slots[0], memory)

    def _decode(self, chunks: Seq[Chunk], slots: list[int], memory: Bytes) -> SlotStep:
        count, highest = len(chunks), max(slots)
        layout = self._layouts[next(rows for rows in self.row_buckets if rows > highest)]
        lengths = [self._past_length(slot) for slot in range(layout.num_rows)]
        for slot, length in enumerate(lengths):
            self._check_room(slot, length, 1)
        views = layout.views(memory)
        views["past_lengths"][:] = lengths
        views["given"][:] = 0
        views["given"][slots] = [given_tokens(chunk)[0] for chunk in chunks]
        # The rows that are sampled come first, in the order in which their tokens are wanted.
        views["logits_rows"][:count] = slots
        views["logits_rows"][count:] = np.setdiff1d(np.arange(layout.num_rows), slots)
        return self._finished(SlotStep(layout, None, count, [], chunks), views)

    def _prompt(self, chunk: Chunk, slot: int, memory: Bytes) -> SlotStep:
        count, start = chunk.num_tokens, chunk.seq.cache_len
        scored = chunk.seq.token_ids[start + 1 : start + 1 + chunk.num_scored]
        num_sampled = int(chunk.samples)
        num_logits = max(1, num_sampled + len(scored))  # an engine takes no empty input
        if count > self._max_chunk or num_logits > self._max_logits:
            raise BackendError(
                f"a step reads up to {self._max_chunk} prompt tokens and gives up to "
                f"{self._max_logits} rows of logits, not {count} and {num_logits}"
            )
        self._check_room(slot, start, count)
        layout = SlotLayout(1, count, num_logits)
        views = layout.views(memory)
        views["past_lengths"][0] = start
        views["given"][:] = given_tokens(chunk)
        rows = [*[count - 1] * num_sampled, *range(len(scored))]
        views["logits_rows"][:] = rows or [0]
        return self._finished(SlotStep(layout, slot, num_sampled, scored, [chunk]), views)

    def _finished(self, step: SlotStep, views: dict[str, npt.NDArray[Any]]) -> SlotStep:
        """The step, with the arrays written that are made alike for all."""
        cells = np.arange(step.layout.num_tokens)
        views["unpack"][:] = cells.reshape(views["unpack"].shape)
        views["pack"][:] = cells
        rows = views["rows"]
        rows["slot"] = -1
        sampling = [chunk.seq for chunk in step.chunks if chunk.samples]
        if sampling:
            rows[: len(sampling)] = self._rows[[seq.slot or 0 for seq in sampling]]
            rows["index"][: len(sampling)] = [seq.draw_index for seq in sampling]
        return step

    def _slot(self, seq: Sequence) -> int:
        """The slot of a sequence, whose parameters are known from here on."""
        if seq.slot is None:
            raise RuntimeError(f"sequence {seq.id} was scheduled without a slot")
        if self._owners[seq.slot] is not seq:
            self._rows[seq.slot] = row_of(seq, self._vocab_size)
            self._owners[seq.slot] = seq
        return seq.slot

    def _past_length(self, slot: int) -> int:
        """Tokens in a slot, which a row that isn't decoding must leave alone; 0 if it is free."""
        owner = self._owners[slot]
        return owner.cache_len if owner is not None and owner.slot == slot else 0

    def _check_room(self, slot: int, length: int, count: int) -> None:
        if length + count > self._capacity:
            raise BackendError(
                f"slot {slot} has {self._capacity} cells, and a step would fill {length + count}"
            )
