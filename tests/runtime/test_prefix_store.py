"""What is kept of prompts is what they computed, and a later prompt is given no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tokenizers import Tokenizer, decoders, models

from llama_runtime.contract import CHUNK_MULTIPLE, last_chunk_start
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import SamplingParams
from llama_runtime.prefix_store import PrefixStore
from llama_runtime.prefixes import block_hashes
from llama_runtime.sequence import Sequence

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
SIZE = CHUNK_MULTIPLE
MAX_LEN = 16 * SIZE
ONE, TWO, THREE, FOUR = ([i] * SIZE for i in range(1, 5))  # what fills a block
_ids = count()


def sequence(prompt: list[int], **params: Any) -> Sequence:
    return Sequence(
        id=next(_ids),
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        params=SamplingParams(**{"max_tokens": 1, **params}),
        seed=0,
        detokenizer=Detokenizer(TABLE),
    )


class Memory:
    """Token ids where a backend has keys and values; -1 where nobody has written."""

    def __init__(self, num_slots: int, num_blocks: int) -> None:
        self.slots = [[-1] * MAX_LEN for _ in range(num_slots)]
        self.blocks = [[-1] * SIZE for _ in range(num_blocks)]
        self.num_saved = 0

    def save_block(self, slot: int, start: int, block: int) -> None:
        self.num_saved += 1
        self.blocks[block] = self.slots[slot][start : start + SIZE]

    def load_block(self, slot: int, start: int, block: int) -> None:
        self.slots[slot][start : start + SIZE] = self.blocks[block]


class Bench:
    """A cache, and the memory that it is about."""

    def __init__(self, num_blocks: int = 16, num_slots: int = 4) -> None:
        self.memory = Memory(num_slots, num_blocks)
        self.store = PrefixStore(num_blocks, self.memory)
        self.cache = SlotCache(num_slots, MAX_LEN, self.store)

    def admit(self, prompt: list[int], **params: Any) -> Sequence:
        seq = sequence(prompt, **params)
        self.cache.allocate(seq)
        return seq

    def advance(self, seq: Sequence, num_tokens: int) -> None:
        """What a step that runs so many tokens of a prompt does."""
        assert seq.slot is not None
        end = min(seq.cache_len + num_tokens, seq.num_prompt_tokens)
        self.memory.slots[seq.slot][seq.cache_len : end] = seq.token_ids[seq.cache_len : end]
        seq.cache_len = end
        self.cache.computed(seq)
        self.cache.check()

    def reuse(self, seq: Sequence) -> int:
        """How many tokens a prompt is spared, which lie in its slot then."""
        before = seq.cache_len
        self.cache.reuse(seq)
        self.cache.check()
        assert seq.slot is not None
        found = self.memory.slots[seq.slot][: seq.cache_len]
        assert found == seq.token_ids[: seq.cache_len]
        return seq.cache_len - before

    def free(self, seq: Sequence) -> None:
        assert seq.slot is not None
        self.memory.slots[seq.slot] = [-1] * MAX_LEN
        self.cache.free(seq)
        self.cache.check()

    def serve(self, prompt: list[int], **params: Any) -> int:
        """Run a prompt from its beginning to its end; how many tokens it was spared."""
        seq = self.admit(prompt, **params)
        spared = self.reuse(seq)
        while seq.cache_len < seq.num_prompt_tokens:
            last = last_chunk_start(seq.num_prompt_tokens)
            self.advance(seq, min(2 * SIZE, last - seq.cache_len) or MAX_LEN)
        self.free(seq)
        return spared


# --- hashes -------------------------------------------------------------------------------------


def test_a_hash_is_of_all_tokens_up_to_the_end_of_its_block() -> None:
    one = block_hashes(sequence([*ONE, *TWO, *THREE[:-1]]), SIZE)
    assert [len(digest) for digest in one] == [32, 32]
    assert block_hashes(sequence([*ONE, *TWO, 9]), SIZE) == one
    assert block_hashes(sequence([*ONE, *THREE]), SIZE)[0] == one[0]
    assert len({*one, *block_hashes(sequence([*TWO, *TWO]), SIZE)}) == 4
    assert block_hashes(sequence([*ONE, *TWO], cache_salt="a"), SIZE) != one
    assert block_hashes(sequence(ONE[1:]), SIZE) == []


def test_a_salt_that_looks_like_tokens_is_none() -> None:
    salts = ["", "\x01", "a", "ab", "ä"]
    first = {block_hashes(sequence(ONE, cache_salt=salt), SIZE)[0] for salt in salts}
    assert len(first) == len(salts)


# --- reuse --------------------------------------------------------------------------------------


def test_a_prompt_is_spared_the_blocks_that_another_one_had() -> None:
    bench = Bench()
    assert bench.serve([*ONE, *TWO, *THREE, 5, 6]) == 0
    assert bench.serve([*ONE, *TWO, *THREE, 7, 8]) == 3 * SIZE
    assert bench.serve([*ONE, *TWO, *FOUR, 7, 8]) == 2 * SIZE
    assert bench.serve([*TWO, *THREE, 7, 8]) == 0
    assert (bench.cache.num_reused_tokens, bench.cache.num_prefix_hits) == (5 * SIZE, 2)


def test_it_is_spared_what_was_computed_since_it_last_ran_and_counted_once() -> None:
    bench = Bench()
    first = bench.admit([*ONE, *TWO, *THREE, 5, 6])
    second = bench.admit([*ONE, *TWO, *THREE, 7, 8])
    assert bench.cache.next_block(first) == bench.cache.next_block(second) is not None
    for num_blocks in (1, 2):
        bench.advance(first, num_blocks * SIZE)
        assert bench.reuse(second) == num_blocks * SIZE
        assert bench.reuse(second) == 0
    assert bench.cache.next_block(second) is None
    assert (second.num_reused, bench.cache.num_prefix_hits) == (3 * SIZE, 1)


@pytest.mark.parametrize("length", [2, 32, 33, 34, 64, 65, 66, 96, 97, 98])
def test_the_last_chunk_always_runs_whole_and_is_not_kept(length: int) -> None:
    prompt = [*ONE, *TWO, *THREE, *FOUR][:length]
    bench = Bench()
    bench.serve(prompt)
    kept = last_chunk_start(length) // SIZE
    assert bench.store.num_kept == bench.memory.num_saved == kept
    assert bench.serve(prompt) == kept * SIZE
    bench.serve([*ONE, *TWO, *THREE, *FOUR, 5])
    seq = bench.admit(prompt)
    assert bench.reuse(seq) == last_chunk_start(length)
    assert bench.cache.next_block(seq) is None


def test_what_is_decoded_or_guessed_is_not_kept() -> None:
    bench = Bench()
    seq = bench.admit([*ONE, 5, 6], max_tokens=100)
    bench.advance(seq, SIZE)
    bench.advance(seq, 2)
    seq.token_ids += TWO * 2
    seq.cache_len = seq.num_tokens
    bench.cache.computed(seq)  # which the engine doesn't even call any more
    assert bench.store.num_kept == 1


def test_another_salt_has_nothing_in_common() -> None:
    bench = Bench()
    bench.serve([*ONE, *TWO, 5, 6], cache_salt="a")
    assert bench.serve([*ONE, *TWO, 5, 6], cache_salt="b") == 0
    assert bench.serve([*ONE, *TWO, 5, 6]) == 0
    assert bench.serve([*ONE, *TWO, 7, 8], cache_salt="a") == 2 * SIZE


def test_a_prompt_whose_rows_are_scored_is_spared_nothing_but_spares_others() -> None:
    bench = Bench()
    for _ in range(2):
        assert bench.serve([*ONE, 5, 6], prompt_logprobs=True) == 0
    seq = bench.admit([*TWO, 5, 6], prompt_logprobs=True)
    assert bench.cache.next_block(seq) is None
    assert bench.serve([*ONE, 5, 6]) == SIZE


def test_two_that_compute_the_same_keep_it_once() -> None:
    bench = Bench()
    seqs = [bench.admit([*ONE, *TWO, 5, 6]) for _ in range(2)]
    for seq in seqs:
        bench.advance(seq, 2 * SIZE)
    assert bench.memory.num_saved == bench.store.num_kept == 2


def test_one_that_is_given_up_midway_leaves_what_it_computed() -> None:
    bench = Bench()
    seq = bench.admit([*ONE, *TWO, *THREE, 5, 6])
    bench.advance(seq, 2 * SIZE)
    bench.free(seq)
    assert bench.serve([*ONE, *TWO, *THREE, 5, 6]) == 2 * SIZE


def test_without_a_store_nothing_is_reused() -> None:
    cache, seq = SlotCache(1, MAX_LEN), sequence([*ONE, 5, 6])
    cache.allocate(seq)
    for use in (cache.reuse, cache.next_block, cache.computed, cache.forget):
        assert use(seq) is None
    assert (seq.cache_len, seq.block_hashes, cache.num_reused_tokens) == (0, None, 0)


# --- eviction -----------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first() -> None:
    bench = Bench(num_blocks=2)
    bench.serve([*ONE, 5, 6])
    bench.serve([*TWO, 5, 6])
    bench.serve([*ONE, 5, 6])  # used again
    bench.serve([*THREE, 5, 6])
    assert bench.serve([*ONE, 5, 6]) == SIZE
    assert bench.serve([*TWO, 5, 6]) == 0


def test_a_chain_loses_its_tail_first() -> None:
    prompt = [*ONE, *TWO, *THREE, 5, 6]
    for num_others in range(4):
        bench = Bench(num_blocks=3)
        bench.serve(prompt)
        for other in range(num_others):
            bench.serve([10 + other] * (SIZE + 2))
        assert bench.serve(prompt) == (3 - num_others) * SIZE


def test_a_chain_that_was_used_up_to_its_middle_still_loses_its_tail_first() -> None:
    bench = Bench(num_blocks=4)
    bench.serve([*ONE, *TWO, *THREE, 5, 6])
    bench.serve([*ONE, *FOUR, 5, 6])
    bench.serve([9] * (SIZE + 2))  # takes THREE's place
    assert bench.serve([*ONE, *TWO, *THREE, 5, 6]) == 2 * SIZE


def test_a_prompt_longer_than_the_store_keeps_its_beginning() -> None:
    prompt = [*ONE, *TWO, *THREE, *FOUR, 5, 6]
    bench = Bench(num_blocks=2)
    for spared in (0, 2 * SIZE, 2 * SIZE):
        assert bench.serve(prompt) == spared
    assert bench.memory.num_saved == 2


def test_prompts_that_take_turns_do_not_throw_each_other_out_in_every_step() -> None:
    bench = Bench(num_blocks=4)
    seqs = [bench.admit([i] * (8 * SIZE + 2)) for i in (1, 2)]
    for _ in range(8):
        for seq in seqs:
            bench.advance(seq, SIZE)
    assert bench.memory.num_saved <= 8
    assert bench.store.num_kept == 4


# --- faults -------------------------------------------------------------------------------------


def test_after_a_fault_nothing_of_a_prompt_is_kept_nor_what_rests_on_it() -> None:
    bench = Bench()
    first = bench.admit([*ONE, *TWO, 5, 6])
    bench.advance(first, SIZE)
    bench.serve([*ONE, *THREE, 5, 6])  # of which the first block is the other's
    bench.serve([*FOUR, 5, 6])
    bench.cache.forget(first)
    bench.cache.check()
    bench.advance(first, SIZE)
    assert bench.store.num_kept == 1
    assert bench.reuse(first) == 0
    assert bench.serve([*ONE, *THREE, 5, 6]) == 0
    assert bench.serve([*FOUR, 5, 6]) == SIZE


def test_what_one_left_that_was_given_up_before_its_fault_showed_goes_with_the_next() -> None:
    bench = Bench()
    bench.serve([*ONE, 5, 6])
    victim = bench.admit([*ONE, 7, 8])
    assert bench.reuse(victim) == SIZE
    bench.cache.forget(victim)
    assert bench.serve([*ONE, 7, 8]) == 0


# --- check --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda bench: bench.store._free.pop(), "don't balance"),
        (lambda bench: bench.store._free.append(0), "don't balance"),
        (lambda bench: bench.store._kept.popitem(), "don't balance"),
        (lambda bench: bench.store._kept.move_to_end(next(iter(bench.store._kept))), "precedes"),
        (lambda bench: bench.store._drop(next(reversed(bench.store._kept))), "precedes"),
        (lambda bench: bench.store._offered.update({sequence(ONE): 1}), "has ended"),
    ],
)
def test_check_finds_what_does_not_balance(harm: Callable[[Bench], object], message: str) -> None:
    bench = Bench()
    bench.serve([*ONE, *TWO, *THREE, 5, 6])
    harm(bench)
    with pytest.raises(RuntimeError, match=message):
        bench.cache.check()


# --- in any order -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How a store is set up: small, so that much is evicted."""

    num_blocks: int
    num_slots: int


prompts = st.builds(
    lambda blocks, rest: [token for block in blocks for token in [block] * SIZE] + [9] * rest,
    st.lists(st.integers(1, 2), max_size=5),
    st.integers(1, 40),
)
salts = st.sampled_from(["", "", "a"])
indices = st.integers(0, 9)


class Kept(RuleBasedStateMachine):
    """Beside the store runs a model that knows prefixes by their tokens instead of hashes."""

    @initialize(limits=st.builds(Limits, st.integers(1, 9), st.integers(1, 3)))
    def start(self, limits: Limits) -> None:
        self.bench = Bench(limits.num_blocks, limits.num_slots)
        self.running: list[Sequence] = []
        self.hurt: set[Sequence] = set()
        self.offered: dict[Sequence, int] = {}
        self.kept: list[tuple[Any, ...]] = []  # salt and tokens, least recently used first
        self.num_spared = 0

    def prefixes(self, seq: Sequence) -> list[tuple[Any, ...]]:
        if seq in self.hurt:
            return []
        tokens, last = seq.token_ids, last_chunk_start(seq.num_prompt_tokens)
        return [(seq.params.cache_salt, *tokens[:end]) for end in range(SIZE, last + 1, SIZE)]

    def touch(self, chain: list[tuple[Any, ...]]) -> None:
        for prefix in reversed(chain):
            if prefix in self.kept:
                self.kept.remove(prefix)
                self.kept.append(prefix)

    @precondition(lambda self: self.bench.cache.num_free)
    @rule(prompt=prompts, salt=salts, scored=st.sampled_from([False, False, True]))
    def admit(self, prompt: list[int], salt: str, scored: bool) -> None:
        seq = self.bench.admit(prompt, cache_salt=salt, prompt_logprobs=scored)
        self.running.append(seq)
        self.offered[seq] = 0

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def reuse(self, index: int) -> None:
        seq = self.running[index % len(self.running)]
        chain, begin = self.prefixes(seq), seq.cache_len // SIZE
        end = begin
        while end < len(chain) and chain[end] in self.kept and not seq.params.prompt_logprobs:
            end += 1
        assert self.bench.reuse(seq) == (end - begin) * SIZE
        self.num_spared += (end - begin) * SIZE
        if end > begin:
            self.touch(chain[:end])
            self.offered[seq] = end

    @precondition(lambda self: self.running)
    @rule(index=indices, num_blocks=st.integers(1, 4))
    def run(self, index: int, num_blocks: int) -> None:
        seq = self.running[index % len(self.running)]
        left = last_chunk_start(seq.num_prompt_tokens) - seq.cache_len
        chain, begin = self.prefixes(seq), self.offered[seq]
        self.bench.advance(seq, min(num_blocks * SIZE, left) if left > 0 else MAX_LEN)
        end = min(seq.cache_len // SIZE, len(chain))
        if end <= begin:
            return
        self.offered[seq] = end
        self.touch(chain[:begin])
        for place in range(begin, end):
            if chain[place] in self.kept:
                self.touch([chain[place]])
                continue
            if place and chain[place - 1] not in self.kept:
                break
            if len(self.kept) == self.bench.store.num_blocks:
                if self.kept[0] in chain[:place]:
                    break
                del self.kept[0]
            self.kept.append(chain[place])
        self.touch(chain[:end])

    @precondition(lambda self: self.running)
    @rule(index=indices, happens=st.sampled_from([False, False, False, True]))
    def hurt_one(self, index: int, happens: bool) -> None:
        if happens:
            seq = self.running[index % len(self.running)]
            chain = self.prefixes(seq)
            self.hurt.add(seq)
            self.kept = [one for one in self.kept if chain[:1] != [one[: SIZE + 1]]]
            self.bench.cache.forget(seq)

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def free(self, index: int) -> None:
        self.bench.free(self.running.pop(index % len(self.running)))

    @invariant()
    def it_keeps_what_the_model_keeps(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.cache.check()
        assert self.bench.cache.num_reused_tokens == self.num_spared
        store, memory = self.bench.store, self.bench.memory
        blocks = [memory.blocks[kept.block] for kept in store._kept.values()]
        assert blocks == [list(prefix[-SIZE:]) for prefix in self.kept]


TestKept = Kept.TestCase
TestKept.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
