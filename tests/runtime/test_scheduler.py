"""What runs in a step: admission, the budget of prompts, and turns of prompts and streams."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from llama_runtime.chunk import Chunk
from llama_runtime.contract import CHUNK_MULTIPLE, MAX_CELLS, MIN_CHUNK
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import SamplingParams
from llama_runtime.scheduler import Scheduler
from llama_runtime.sequence import Sequence

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
_ids = count()


def sequence(num_prompt_tokens: int, max_tokens: int = 8) -> Sequence:
    return Sequence(
        id=next(_ids),
        token_ids=[0] * num_prompt_tokens,
        num_prompt_tokens=num_prompt_tokens,
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        detokenizer=Detokenizer(TABLE),
    )


def scheduler(
    num_slots: int,
    prompt_budget: int = 1000,
    max_chunk: int = 512,
    *,
    refill: bool = True,
    gather: int = 0,
) -> Scheduler:
    return Scheduler(
        SlotCache(num_slots, max_len=2000),
        prompt_budget=prompt_budget,
        max_chunk=max_chunk,
        refill=refill,
        gather=gather,
    )


def finish_step(chunks: list[Chunk]) -> list[Sequence]:
    """What the engine does with the chunks of a step; the sequences that got a token."""
    sampled = [chunk.seq for chunk in chunks if chunk.samples]
    for chunk in chunks:
        chunk.seq.cache_len += chunk.num_tokens
    for seq in sampled:
        seq.token_ids.append(1)
    return sampled


def lengths(chunks: list[Chunk]) -> dict[int, int]:
    return {chunk.seq.id: chunk.num_tokens for chunk in chunks}


def in_prompt(seq: Sequence) -> bool:
    return seq.cache_len < seq.num_prompt_tokens


def test_nothing_is_scheduled_when_nothing_waits_or_runs() -> None:
    assert scheduler(2).schedule() == []


def test_a_prompt_in_the_cache_decodes_one_token_a_step() -> None:
    rows, seq = scheduler(1), sequence(5)
    rows.add(seq)
    assert lengths(rows.schedule()) == {seq.id: 5}
    for _ in range(3):
        finish_step([Chunk(seq, seq.num_tokens - seq.cache_len)])
        assert lengths(rows.schedule()) == {seq.id: 1}


def test_a_chunk_samples_exactly_when_it_ends_at_the_newest_token() -> None:
    seq = sequence(50)
    assert not Chunk(seq, 32).samples
    seq.cache_len = 32
    assert not Chunk(seq, 17).samples
    assert Chunk(seq, 18).samples
    seq.cache_len = 50
    seq.token_ids.append(1)
    assert Chunk(seq, 1).samples


def test_admission_is_in_order_of_arrival_into_the_lowest_slots() -> None:
    rows, seqs = scheduler(3), [sequence(5) for _ in range(5)]
    for seq in seqs:
        rows.add(seq)
    rows.schedule()
    assert [seq.slot for seq in seqs] == [0, 1, 2, None, None]
    assert rows.running == seqs[:3]
    assert list(rows.waiting) == seqs[3:]


def test_a_freed_slot_is_refilled_in_the_next_step() -> None:
    rows, seqs = scheduler(2), [sequence(5) for _ in range(3)]
    for seq in seqs:
        rows.add(seq)
    finish_step(rows.schedule())
    rows.remove(seqs[0])
    assert lengths(finish_and_return(rows)) == {seqs[1].id: 1}  # whose turn it is
    assert (seqs[0].slot, seqs[2].slot) == (None, 0)
    assert lengths(rows.schedule()) == {seqs[2].id: 5}


def test_fixed_batches_wait_until_every_slot_is_free() -> None:
    rows, seqs = scheduler(2, refill=False), [sequence(5) for _ in range(3)]
    for seq in seqs:
        rows.add(seq)
    finish_step(rows.schedule())
    rows.remove(seqs[0])
    assert lengths(finish_and_return(rows)) == {seqs[1].id: 1}
    rows.remove(seqs[1])
    assert lengths(rows.schedule()) == {seqs[2].id: 5}


def full(gather: int) -> tuple[Scheduler, list[Sequence]]:
    """One of 16 slots, all of whose sequences decode, and those that wait."""
    rows, seqs = scheduler(16, gather=gather), [sequence(5, max_tokens=100) for _ in range(26)]
    for seq in seqs:
        rows.add(seq)
    finish_step(rows.schedule())
    for seq in seqs[:2]:
        rows.remove(seq)
    return rows, seqs[16:]


def test_slots_that_become_free_are_filled_together_where_that_is_as_quick() -> None:
    rows, late = full(gather=8)
    for _ in range(8):
        assert not rows.has_room
        chunks = rows.schedule()
        assert set(lengths(chunks).values()) == {1}
        finish_step(chunks)
    assert list(lengths(rows.schedule())) == [late[0].id, late[1].id]


def test_many_free_slots_wait_for_no_more() -> None:
    rows, late = full(gather=8)
    finish_step(rows.schedule())
    rows.remove(rows.running[0])
    assert list(lengths(rows.schedule())) == [seq.id for seq in late[:3]]
    for seq in list(rows.running[2:]):
        rows.remove(seq)
    for seq in list(rows.waiting):
        rows.remove(seq)
    assert rows.has_room
    alone = sequence(5)
    rows.add(alone)
    rows.schedule()
    assert alone.slot is not None


def finish_and_return(rows: Scheduler) -> list[Chunk]:
    chunks = rows.schedule()
    finish_step(chunks)
    return chunks


def test_removing_works_wherever_a_sequence_is() -> None:
    rows, seqs = scheduler(1), [sequence(5) for _ in range(3)]
    for seq in seqs:
        rows.add(seq)
    rows.schedule()
    rows.remove(seqs[1])
    rows.remove(seqs[0])
    assert rows.cache.num_free == 1
    assert lengths(rows.schedule()) == {seqs[2].id: 5}


def test_a_long_prompt_and_running_streams_take_turns() -> None:
    rows = scheduler(4, MIN_CHUNK, MIN_CHUNK)
    streams = [sequence(3, max_tokens=100) for _ in range(3)]
    for seq in streams:
        rows.add(seq)
    finish_step(rows.schedule())
    long = sequence(1500)
    rows.add(long)
    num_steps = 0
    while in_prompt(long):
        assert lengths(finish_and_return(rows)) == {seq.id: 1 for seq in streams}
        assert list(lengths(finish_and_return(rows))) == [long.id]
        num_steps += 1
    assert num_steps == 1 + 1500 // CHUNK_MULTIPLE
    assert finish_step(rows.schedule()) == [*streams, long]


def test_the_oldest_prompt_moves_in_every_other_step_beside_a_full_batch() -> None:
    rows = scheduler(8, MIN_CHUNK, MIN_CHUNK)
    for _ in range(7):
        rows.add(sequence(1))
    finish_step(rows.schedule())
    for num_prompt_tokens in range(1, 140):
        seq = sequence(num_prompt_tokens)
        rows.add(seq)
        while in_prompt(seq):
            before = seq.cache_len
            finish_step(rows.schedule())
            finish_step(rows.schedule())
            assert seq.cache_len > before
        rows.remove(seq)


def test_what_one_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    rows = scheduler(4, 110, max_chunk=64)
    first, second, third, fourth = (sequence(n) for n in (200, 7, 500, 3))
    for seq in (first, second, third, fourth):
        rows.add(seq)
    # 110 - 64 - 7 = 39 leave room for 32; of the last 7 the fourth takes 3.
    assert lengths(rows.schedule()) == {first.id: 64, second.id: 7, third.id: 32, fourth.id: 3}


def test_a_prompt_that_does_not_fit_holds_the_later_ones_back() -> None:
    rows = scheduler(3, 60, max_chunk=64)
    first, second, third = (sequence(n) for n in (40, 31, 3))
    for seq in (first, second, third):
        rows.add(seq)
    assert lengths(rows.schedule()) == {first.id: 32}  # 28 are left, and the second needs 31


def test_prompts_in_slots_far_apart_share_a_step_only_while_its_cells_are_few() -> None:
    rows = scheduler(64)
    between = [sequence(3, max_tokens=100) for _ in range(64)]
    for seq in between:
        rows.add(seq)
    finish_step(rows.schedule())
    for seq in (between[0], between[63]):
        rows.remove(seq)
    short, long = sequence(16), sequence(17)  # 64 slots of 16 columns are 1,024 cells
    rows.add(short)
    rows.add(long)
    finish_step(rows.schedule())  # the turn of those that decode
    assert lengths(finish_and_return(rows)) == {short.id: 16}
    finish_step(rows.schedule())
    assert lengths(finish_and_return(rows)) == {long.id: 17}
    for seq in (short, long):
        rows.remove(seq)
    pair = [sequence(16), sequence(16)]
    for seq in pair:
        rows.add(seq)
    finish_step(rows.schedule())
    assert lengths(rows.schedule()) == {seq.id: 16 for seq in pair}


@given(
    num_slots=st.integers(1, 5),
    spare=st.integers(0, 150),
    max_chunk=st.integers(MIN_CHUNK, 200),
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=12),
)
def test_no_step_exceeds_the_budget_and_none_is_idle(
    num_slots: int, spare: int, max_chunk: int, prompts: list[int]
) -> None:
    budget = MIN_CHUNK + spare
    rows = scheduler(num_slots, budget, max_chunk)
    seqs = [sequence(n, max_tokens=1 + i % 4) for i, n in enumerate(prompts)]
    for seq in seqs:
        rows.add(seq)
    while rows.waiting or rows.running:
        chunks = rows.schedule()
        decoding = {seq.id: 1 for seq in rows.running if seq.decodes}
        oldest = next((seq for seq in rows.running if not seq.decodes), None)
        scheduled = lengths(chunks)
        assert len(scheduled) == len(chunks) > 0
        if scheduled != decoding:  # all of them, or prompts alone
            assert oldest is not None
            assert scheduled[oldest.id] > 0
            assert sum(scheduled.values()) <= budget
            assert 2 <= min(scheduled.values()) <= max(scheduled.values()) <= max_chunk
            slots = [chunk.seq.slot or 0 for chunk in chunks]
            assert (max(slots) - min(slots) + 1) * max(scheduled.values()) <= MAX_CELLS
        for seq in finish_step(chunks):
            if seq.num_completion_tokens == seq.params.max_tokens:
                rows.remove(seq)
        rows.cache.check()
    assert all(seq.num_completion_tokens == seq.params.max_tokens for seq in seqs)


@given(
    num_slots=st.integers(1, 5),
    spare=st.integers(0, 150),
    max_chunk=st.integers(MIN_CHUNK, 200),
    num_prompt_tokens=st.integers(1, 200),
    num_seqs=st.integers(1, 12),
)
def test_prompts_of_one_length_get_their_first_tokens_in_order_of_arrival(
    num_slots: int, spare: int, max_chunk: int, num_prompt_tokens: int, num_seqs: int
) -> None:
    rows = scheduler(num_slots, MIN_CHUNK + spare, max_chunk)
    seqs = [sequence(num_prompt_tokens, max_tokens=1 + i % 3) for i in range(num_seqs)]
    for seq in seqs:
        rows.add(seq)
    first_tokens = []
    while rows.waiting or rows.running:
        for seq in finish_step(rows.schedule()):
            if seq.num_completion_tokens == 1:
                first_tokens.append(seq.id)
            if seq.num_completion_tokens == seq.params.max_tokens:
                rows.remove(seq)
    assert first_tokens == [seq.id for seq in seqs]


def test_limits_under_which_a_prompt_might_never_move_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_chunk must lie in 33 to 512, not 32"):
        scheduler(4, max_chunk=32)
    with pytest.raises(ValueError, match=r"max_chunk must lie in 33 to 512, not 513"):
        scheduler(4, max_chunk=513)
    with pytest.raises(ValueError, match=r"prompt_budget must be at least 33, not 32"):
        scheduler(4, prompt_budget=32)
    scheduler(4, prompt_budget=33, max_chunk=33)


def streams(rows: Scheduler, count: int, *, streamed: bool) -> list[Sequence]:
    """Sequences whose prompts are in the cache."""
    seqs = [sequence(2) for _ in range(count)]
    for seq in seqs:
        seq.streamed = streamed
        rows.add(seq)
    while any(not seq.decodes or seq.cache_len == 0 for seq in seqs):
        finish_step(rows.schedule())
    return seqs


@pytest.mark.parametrize(
    ("count", "streamed", "longest"),
    [
        pytest.param(1, False, 128, id="nobody watches"),
        pytest.param(1, True, 32, id="one stream, the least"),
        pytest.param(16, True, 32, id="as many as make the least"),
        pytest.param(32, True, 64, id="twice as many as decode"),
        pytest.param(64, True, 128, id="and no more than without"),
    ],
)
def test_steps_of_prompts_are_short_while_somebody_reads_a_stream(
    count: int, streamed: bool, longest: int
) -> None:
    rows = Scheduler(SlotCache(80, 1024), prompt_budget=128, max_chunk=128, stream_budget=MIN_CHUNK)
    running = streams(rows, count, streamed=streamed)
    prompt = sequence(500)
    rows.add(prompt)
    chunks = rows.schedule()
    while chunks[0].seq is not prompt:
        finish_step(chunks)
        chunks = rows.schedule()
    assert lengths(chunks) == {prompt.id: longest}
    for seq in running:
        rows.remove(seq)
    finish_step(chunks)
    assert lengths(rows.schedule()) == {prompt.id: 128}


def test_a_prompt_that_is_read_as_it_comes_does_not_slow_itself_down() -> None:
    rows = Scheduler(SlotCache(2, 1024), prompt_budget=128, max_chunk=128, stream_budget=MIN_CHUNK)
    prompt = sequence(500)
    prompt.streamed = True
    rows.add(prompt)
    assert lengths(rows.schedule()) == {prompt.id: 128}


def test_no_more_run_than_the_limit_allows_and_those_beyond_it_may_end() -> None:
    rows = scheduler(4)
    seqs = [sequence(2) for _ in range(6)]
    for seq in seqs:
        rows.add(seq)
    rows.limit = 3
    rows.schedule()
    assert [seq in rows.running for seq in seqs] == [True] * 3 + [False] * 3
    assert not rows.has_room
    rows.limit = 2
    rows.remove(seqs[0])
    rows.schedule()
    assert len(rows.running) == 2
    rows.limit = 4
    rows.schedule()
    assert len(rows.running) == 4


class Shared(SlotCache):
    """A cache in which prompts that begin with the same token share blocks of 32 tokens."""

    def __init__(self, num_slots: int, max_len: int) -> None:
        super().__init__(num_slots, max_len)
        self.blocks: set[bytes] = set()

    def block(self, seq: Sequence, start: int) -> bytes:
        return bytes([seq.token_ids[0] % 256, start // 32])

    def reuse(self, seq: Sequence) -> None:
        while seq.cache_len + 32 < seq.num_tokens and self.block(seq, seq.cache_len) in self.blocks:
            seq.cache_len += 32

    def next_block(self, seq: Sequence) -> bytes | None:
        whole = seq.cache_len + 32 <= seq.num_prompt_tokens
        return self.block(seq, seq.cache_len) if whole else None

    def computed(self, seq: Sequence) -> None:
        self.blocks |= {self.block(seq, start) for start in range(0, seq.cache_len - 31, 32)}


def test_prompts_that_begin_alike_wait_for_the_one_that_computes_it() -> None:
    cache = Shared(3, 512)
    rows = Scheduler(cache, prompt_budget=256, max_chunk=64)
    first, second, other = sequence(140), sequence(140), sequence(140)
    other.token_ids[0] += 1
    for seq in (first, second, other):
        rows.add(seq)
    ran = []
    for _ in range(3):
        chunks = rows.schedule()
        ran.append(lengths(chunks))
        for chunk in chunks:
            chunk.seq.cache_len += chunk.num_tokens
            cache.computed(chunk.seq)
    a, b, c = first.id, second.id, other.id
    assert ran == [{a: 64, c: 64}, {a: 64, c: 64}, {a: 12, b: 12, c: 12}]
