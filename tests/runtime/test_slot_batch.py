"""The arrays of a step in the ``tensorrt`` dialect, and what the scheduler gives it to build."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_runtime.chunk import Chunk, any_chunk
from llama_runtime.errors import BackendError
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import SamplingParams
from llama_runtime.scheduler import Scheduler
from llama_runtime.sequence import Sequence
from llama_runtime.slot_batch import ALIGNMENT, SlotBatch, SlotLayout, SlotStep

CAPACITY, MAX_CHUNK, MAX_LOGITS, NUM_SLOTS = 128, 32, 9, 6


def batch() -> SlotBatch:
    return SlotBatch(
        num_slots=NUM_SLOTS,
        capacity=CAPACITY,
        max_chunk=MAX_CHUNK,
        max_logits=MAX_LOGITS,
        vocab_size=50,
    )


def sequence(slot: int | None, tokens: int, *, cached: int = 0, **params: Any) -> Sequence:
    made = SamplingParams(**{"max_tokens": 20, **params})
    seq = Sequence(slot or 0, list(range(10, 10 + tokens)), tokens, made, 7, None)  # type: ignore[arg-type]
    seq.slot, seq.cache_len = slot, cached
    return seq


def built(made: SlotBatch, chunks: Seq[Chunk]) -> tuple[SlotStep, dict[str, npt.NDArray[Any]]]:
    memory = np.full(made.num_bytes, 0xEE, np.uint8)
    step = made.build(chunks, memory)
    return step, step.layout.views(memory)


def test_a_step_that_decodes_runs_the_lowest_slots_and_samples_in_the_order_of_its_chunks() -> None:
    made = batch()
    reading = sequence(1, 40, cached=30)
    built(made, [Chunk(reading, 10)])
    pending = sequence(3, 5, cached=5)
    pending.num_pending = 1
    known = sequence(0, 8, cached=7)
    step, views = built(made, [Chunk(pending, 1), Chunk(known, 1)])
    assert step.layout == SlotLayout(num_rows=4, num_columns=1, num_logits=4)
    assert (step.slot, step.num_sampled, step.scored) == (None, 2, [])
    assert views["past_lengths"].tolist() == [7, 30, 0, 5]
    assert views["given"].tolist() == [17, 0, 0, -1 - 3]
    assert views["unpack"].tolist() == [[0], [1], [2], [3]]
    assert views["pack"].tolist() == [0, 1, 2, 3]
    assert views["logits_rows"].tolist() == [3, 0, 1, 2]
    assert views["rows"]["slot"].tolist() == [3, 0, -1, -1]
    assert views["rows"]["index"][:2].tolist() == [1, 0]


def test_a_slot_that_was_freed_counts_as_empty() -> None:
    made = batch()
    gone = sequence(0, 9, cached=8)
    built(made, [Chunk(gone, 1)])
    gone.slot = None
    _, views = built(made, [Chunk(sequence(1, 4, cached=3), 1)])
    assert views["past_lengths"].tolist() == [0, 3]


@pytest.mark.parametrize(("slot", "rows"), [(0, 1), (1, 2), (2, 4), (3, 4), (4, 6), (5, 6)])
def test_rows_are_rounded_up_to_sizes_that_are_captured(slot: int, rows: int) -> None:
    step, _ = built(batch(), [Chunk(sequence(slot, 4, cached=3), 1)])
    assert step.layout.num_rows == rows


def test_a_step_of_a_prompt_is_one_row_of_its_own_slot() -> None:
    step, views = built(batch(), [Chunk(sequence(4, 30, cached=20), 10)])
    assert step.layout == SlotLayout(num_rows=1, num_columns=10, num_logits=1)
    assert (step.slot, step.num_sampled) == (4, 1)
    assert views["past_lengths"].tolist() == [20]
    assert views["given"].tolist() == list(range(30, 40))
    assert views["unpack"].tolist() == [list(range(10))]
    assert views["logits_rows"].tolist() == [9]
    assert views["rows"]["slot"].tolist() == [4]


def test_a_part_of_a_prompt_gives_a_row_that_nobody_samples() -> None:
    step, views = built(batch(), [Chunk(sequence(2, 30), 10)])
    assert (step.num_sampled, step.layout.num_logits) == (0, 1)
    assert views["rows"]["slot"].tolist() == [-1]
    one, _ = built(batch(), [Chunk(sequence(0, 30, cached=3), 1)])
    assert (one.slot, one.num_sampled) == (0, 0)  # of one token, and still of a prompt


def test_rows_that_score_come_behind_the_one_that_is_sampled() -> None:
    seq = sequence(0, 8, cached=4, prompt_logprobs=True)
    step, views = built(batch(), [Chunk(seq, 4)])
    assert step.scored == [15, 16, 17]
    assert views["logits_rows"].tolist() == [3, 0, 1, 2]
    assert views["rows"]["slot"].tolist() == [0, -1, -1, -1]


def test_arrays_lie_where_tensorrt_can_read_them_and_apart() -> None:
    made = batch()
    for layout in (SlotLayout(6, 1, 6), SlotLayout(1, 32, 9), SlotLayout(1, 1, 1)):
        ends = 0
        for offset, dtype, shape in layout.arrays.values():
            assert offset % ALIGNMENT == 0
            assert offset >= ends
            ends = offset + dtype.itemsize * int(np.prod(shape))
        assert ends == layout.num_bytes <= made.num_bytes


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([Chunk(sequence(2, 127, cached=128), 1)], "slot 2 .* fill 129"),
        ([Chunk(sequence(3, 150, cached=120), 9)], "slot 3 has 128 cells, .* fill 129"),
        ([Chunk(sequence(0, 50), 33)], "up to 32 prompt tokens .* not 33 and 1"),
        ([Chunk(sequence(0, 50, prompt_logprobs=True), 10)], "9 rows of logits, not 10 and 10"),
        ([Chunk(sequence(0, 9), 5), Chunk(sequence(1, 9), 5)], "one prompt, not 2"),
        ([Chunk(sequence(0, 9, cached=8), 1), Chunk(sequence(1, 9), 5)], "one prompt, not 2"),
    ],
)
def test_what_an_engine_has_no_room_for_is_refused(chunks: list[Chunk], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        built(batch(), chunks)


def test_a_row_beside_that_has_no_cell_left_is_refused_too() -> None:
    made = batch()
    full = sequence(1, 120, cached=119)
    built(made, [Chunk(full, 1)])
    full.cache_len = CAPACITY
    with pytest.raises(BackendError, match="slot 1 has 128 cells"):
        built(made, [Chunk(sequence(2, 9, cached=8), 1)])
    step, _ = built(made, [Chunk(sequence(0, 9, cached=8), 1)])  # which slot 1 is no part of
    assert step.layout.num_rows == 1


def test_a_sequence_without_a_slot_is_a_defect() -> None:
    with pytest.raises(RuntimeError, match="without a slot"):
        built(batch(), [Chunk(sequence(None, 4), 4)])


def scheduler(**limits: Any) -> Scheduler:
    return Scheduler(
        SlotCache(40, CAPACITY),
        prompt_budget=100,
        max_chunk=100,
        cut=any_chunk,
        max_cells=None,
        **limits,
    )


@pytest.mark.parametrize(("limits", "count"), [({}, 3), ({"max_prompts": 1}, 1)])
def test_a_step_reads_no_more_prompts_than_the_scheduler_was_told(
    limits: dict[str, int], count: int
) -> None:
    made = scheduler(**limits)
    for _ in range(3):
        made.add(sequence(None, 20))
    chunks = made.schedule()
    assert [(chunk.seq.slot, chunk.num_tokens) for chunk in chunks] == [
        (slot, 20) for slot in range(count)
    ]


@pytest.mark.parametrize(("limits", "tokens"), [({}, 60), ({"max_logits": 9}, 9)])
def test_a_step_scores_no_more_rows_than_the_scheduler_was_told(
    limits: dict[str, int], tokens: int
) -> None:
    made = scheduler(**limits)
    made.add(sequence(None, 60, prompt_logprobs=True))
    assert [chunk.num_tokens for chunk in made.schedule()] == [tokens]
