"""The arrays of a step say exactly which token runs where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from llama_runtime.chunk import Chunk
from llama_runtime.contract import MAX_CELLS, MIN_CHUNK, SLOTS
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.step_batch import Step, StepBatch

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
NUM_SLOTS, BUDGET = 6, 150


def sequence(slot: int | None, tokens: list[int], cache_len: int = 0) -> Sequence:
    return Sequence(
        id=100 if slot is None else slot,
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        params=SamplingParams(),
        seed=0,
        detokenizer=Detokenizer(TABLE),
        cache_len=cache_len,
        slot=slot,
    )


def batch() -> StepBatch:
    return StepBatch(NUM_SLOTS, BUDGET)


def test_a_mixed_step_is_written_out() -> None:
    decoding = Chunk(sequence(3, [10, 11, 12, 13], cache_len=3), 1)
    part = Chunk(sequence(0, list(range(20, 60)), cache_len=0), 3)  # does not reach its end
    whole = Chunk(sequence(2, [70, 71], cache_len=0), 2)
    step = batch().build([decoding, part, whole])
    assert step.input_ids.tolist() == [13, 20, 21, 22, 70, 71, 13, 13]
    assert step.pack.tolist() == [9, 0, 1, 2, 6, 7, 9, 9]
    assert step.unpack.tolist() == [
        [1, 2, 3],
        [0, 0, 0],
        [4, 5, 0],
        [0, 0, 0],
    ]
    assert step.first_slot == 0
    assert step.seqlens_k.tolist() == [2, 0, 1, 3]
    assert step.query_seqlens.tolist() == [3, 0, 2, 1]
    assert step.total_sequence_length.tolist() == 4
    assert step.logits_rows.tolist() == [0, 5, 0, 0]
    assert step.num_logits == 2
    assert list(step.chunks) == [decoding, part, whole]


def test_prompts_are_seen_from_their_lowest_slot_to_their_highest() -> None:
    chunks = [Chunk(sequence(4, [70, 71]), 2), Chunk(sequence(2, [60, 61, 62]), 3)]
    step = batch().build(chunks)
    assert step.first_slot == 2
    assert step.unpack.tolist() == [[2, 3, 4], [0, 0, 0], [0, 1, 0]]
    assert step.pack.tolist() == [6, 7, 0, 1, 2, 6, 6, 6]
    assert step.seqlens_k.tolist() == [2, 0, 1]
    assert step.query_seqlens.tolist() == [3, 0, 2]
    assert step.total_sequence_length.tolist() == 3


def test_a_step_that_decodes_covers_all_slots_in_one_column() -> None:
    chunks = [Chunk(sequence(slot, [7, 8, slot], cache_len=2), 1) for slot in (3, 1)]
    step = batch().build(chunks)
    assert step.first_slot == 0
    assert step.unpack.tolist() == [[0], [1], [0], [0], [0], [0]]
    assert step.pack.tolist() == [3, 1, 3, 3]
    assert step.seqlens_k.tolist() == [0, 2, 0, 2, 0, 0]
    assert step.query_seqlens.tolist() == [0, 1, 0, 1, 0, 0]


def test_arrays_have_the_types_and_axes_of_the_contract() -> None:
    step = batch().build([Chunk(sequence(1, [5, 6, 7]), 3)])
    sizes = {"B": 1, "N": 4, "R": 4, "S": 3}
    for spec in SLOTS.inputs:
        array = getattr(step, spec.name)
        assert array.dtype == spec.dtype, spec.name
        assert array.shape == tuple(sizes[axis] for axis in spec.axes), spec.name
        assert array.flags.c_contiguous, spec.name


def test_a_step_without_samples_has_no_logits_rows() -> None:
    step = batch().build([Chunk(sequence(1, [0] * 50), 32)])
    assert step.num_logits == len(step.logits_rows) == 0


def test_buffers_are_reused_and_keep_nothing_of_the_step_before() -> None:
    one = batch()
    first = one.build([Chunk(sequence(i, list(range(1, 12))), 11) for i in range(NUM_SLOTS)])
    buffers = [getattr(first, spec.name) for spec in SLOTS.inputs]
    chunks = [Chunk(sequence(4, [8, 9], cache_len=1), 1)]
    second = one.build(chunks)
    assert_same(second, batch().build(chunks))
    for spec, buffer in zip(SLOTS.inputs, buffers, strict=True):
        assert np.shares_memory(getattr(second, spec.name), buffer), spec.name


def assert_same(step: Step, expected: Step) -> None:
    for spec in SLOTS.inputs:
        assert np.array_equal(getattr(step, spec.name), getattr(expected, spec.name)), spec.name


def test_the_fullest_steps_fit_the_buffers() -> None:
    one = StepBatch(num_slots=3, prompt_budget=3 * MIN_CHUNK)
    step = one.build([Chunk(sequence(i, [i] * MIN_CHUNK), MIN_CHUNK) for i in range(3)])
    assert step.input_ids.tolist() == [0] * 33 + [1] * 33 + [2] * 33 + [0]
    assert step.unpack.shape == (3, MIN_CHUNK)
    assert step.num_logits == 3
    many = StepBatch(num_slots=1500, prompt_budget=MIN_CHUNK)
    step = many.build([Chunk(sequence(i, [i]), 1) for i in range(1500)])
    assert step.unpack.shape == (1500, 1)
    assert step.num_logits == 1500
    far = [Chunk(sequence(slot, [1, 2]), 2) for slot in (0, MAX_CELLS // 2 - 1)]
    assert many.build(far).unpack.shape == (MAX_CELLS // 2, 2)


def test_a_sequence_without_a_slot_is_a_defect() -> None:
    with pytest.raises(RuntimeError, match="sequence 100 was scheduled without a slot"):
        batch().build([Chunk(sequence(None, [1]), 1)])


chunk_lengths = st.dictionaries(
    st.integers(0, NUM_SLOTS - 1),
    st.tuples(st.integers(0, 90), st.integers(1, 25), st.integers(0, 3)),
    min_size=1,
)


@given(chunk_lengths, st.permutations(range(NUM_SLOTS)))
def test_unpack_and_pack_are_inverse_and_carry_every_token(
    lengths: dict[int, tuple[int, int, int]], order: list[int]
) -> None:
    chunks = []
    for slot in order:
        if slot in lengths:
            past, new, rest = lengths[slot]
            tokens = [1000 * slot + i for i in range(past + new + rest)]
            chunks.append(Chunk(sequence(slot, tokens, cache_len=past), new))
    step = batch().build(chunks)
    low = step.first_slot
    assert low == (0 if step.unpack.shape[1] == 1 else min(lengths))
    cells = step.unpack.reshape(-1)
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    # A packed row goes to the cell that reads it, and a real cell reads the slot's next tokens.
    assert cells[step.pack[:num_tokens]].tolist() == list(range(num_tokens))
    for slot in range(NUM_SLOTS):
        past, new, _ = lengths.get(slot, (0, 0, 0))
        if not low <= slot < low + len(step.unpack):
            assert not new
            continue
        read = step.input_ids[step.unpack[slot - low, :new]]
        assert read.tolist() == [1000 * slot + past + i for i in range(new)]
        assert step.query_seqlens[slot - low] == new
        assert step.seqlens_k[slot - low] == max(0, past + new - 1)
        assert not step.unpack[slot - low, new:].any()
    assert step.total_sequence_length == step.seqlens_k.max() + 1
    sampling = [chunk for chunk in chunks if chunk.samples]
    assert step.num_logits == len(sampling)
    newest = step.input_ids[step.logits_rows[: step.num_logits]]
    assert newest.tolist() == [chunk.seq.token_ids[-1] for chunk in sampling]
