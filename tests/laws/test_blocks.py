"""Whatever happens in whatever order, blocks balance and what is shared is what was computed.

A list of token ids stands for the device's memory: a step writes its tokens through the block
table, and at any time each sequence must find its own tokens there. Beside it runs a model of the
pool that knows prefixes by their tokens instead of hashes, and says which block is handed out next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tokenizers import Tokenizer, decoders, models

from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.paged_cache import PagedCache
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
MAX_LEN = 24
Prefix = tuple[int | str, ...]  # a salt and tokens
Item = TypeVar("Item")

tokens = st.integers(0, 1)


@dataclass(frozen=True)
class Limits:
    """How a pool is set up: small, so that content is evicted."""

    num_slots: int
    num_blocks: int
    block_size: int
    share_prefixes: bool

    def cache(self) -> PagedCache:
        return PagedCache(
            self.num_slots,
            MAX_LEN,
            self.num_blocks,
            self.block_size,
            share_prefixes=self.share_prefixes,
        )


limits = st.builds(
    Limits,
    num_slots=st.integers(1, 4),
    num_blocks=st.integers(5, 20),
    block_size=st.integers(1, 4),
    share_prefixes=st.sampled_from([True, True, True, False]),
)
# Two tokens, and all of them alike but for the last few, so that many prompts begin alike.
prompts = st.builds(
    lambda length, rest: [0] * length + rest,
    st.integers(0, 10),
    st.lists(tokens, min_size=1, max_size=4),
)
several_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 5),
    prompt_logprobs=st.sampled_from([False, False, False, True]),
    cache_salt=st.sampled_from(["", "", "", "a"]),
)
indices = st.integers(0, 11)  # of one of a list, whose length is not known yet


def one_of(items: list[Item], index: int) -> Item:
    return items[index % len(items)]


class Blocks(RuleBasedStateMachine):
    """Adds, admits, runs, hurts and frees in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.num_added = 0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_saved = 0  # prompt tokens that were found in the memory
        self.hurt: set[Sequence] = set()  # after a fault: their memory may hold anything
        self.shareable: dict[Prefix, int] = {}  # the block that ends such a prompt
        self.num_offered: dict[Sequence, int] = {}  # of a prompt's blocks: each is offered once
        self.kept: list[int] = []  # of those the ones that nobody holds, least recently used first

    @initialize(chosen=limits)
    def start(self, chosen: Limits) -> None:
        self.limits = chosen
        self.cache = chosen.cache()
        self.memory = [[-1] * chosen.block_size for _ in range(chosen.num_blocks)]

    # --- what the model says ---

    def holders(self, block: int) -> list[Sequence]:
        return [seq for seq in self.running if block in self.cache.table(seq)]

    def prefixes(self, seq: Sequence, num_tokens: int) -> list[Prefix]:
        """The prompt up to the end of each block that lies within its first tokens."""
        size = self.limits.block_size
        prompt, salt = (
            seq.token_ids[: min(num_tokens, seq.num_prompt_tokens)],
            seq.params.cache_salt,
        )
        return [(salt, *prompt[:end]) for end in range(size, len(prompt) + 1, size)]

    def found(self, seq: Sequence) -> list[int]:
        """The blocks that a prompt may share now."""
        blocks: list[int] = []
        if seq.params.prompt_logprobs:
            return blocks
        for prefix in self.prefixes(seq, seq.num_prompt_tokens - 1):
            if prefix not in self.shareable:
                break
            blocks.append(self.shareable[prefix])
        return blocks

    def needs(self, seq: Sequence) -> int:
        num_tokens = seq.num_prompt_tokens + seq.params.max_tokens
        return (num_tokens + self.limits.block_size - 1) // self.limits.block_size

    def idle(self) -> list[int]:
        held = {block for seq in self.running for block in self.cache.table(seq)}
        return [block for block in range(self.limits.num_blocks) if block not in held]

    # --- what happens ---

    @rule(prompt=prompts, params=several_params)
    def add(self, prompt: list[int], params: SamplingParams) -> None:
        seq = Sequence(self.num_added, list(prompt), len(prompt), params, 0, Detokenizer(TABLE))
        self.num_added += 1
        self.waiting.append(seq)

    @rule(prompt=prompts, params=several_params, count=st.integers(1, 3))
    def add_and_run(self, prompt: list[int], params: SamplingParams, count: int) -> None:
        for _ in range(count):
            self.add(prompt, params)
            self.admit(len(self.waiting) - 1)
            if self.running:
                self.run_to_the_end(len(self.running) - 1)

    @precondition(lambda self: self.waiting)
    @rule(index=indices)
    def admit(self, index: int) -> None:
        seq = one_of(self.waiting, index)
        found, idle = self.found(seq), self.idle()
        fresh = [block for block in idle if block not in found]
        num_fresh = self.needs(seq) - len(found)
        fits = len(self.running) < self.limits.num_slots and num_fresh <= len(fresh)
        assert self.cache.fits(seq) == fits
        if not fits:
            with pytest.raises(RuntimeError, match="can't be given"):
                self.cache.allocate(seq)
            assert seq.slot is None
            return
        self.cache.allocate(seq)
        self.waiting.remove(seq)
        self.running.append(seq)
        table = self.cache.table(seq)
        assert table[: len(found)] == found
        assert seq.cache_len == len(found) * self.limits.block_size
        self.num_saved += seq.cache_len
        self.num_offered[seq] = len(found)
        self.kept = [block for block in self.kept if block not in found]
        # Content goes only when nothing else is left, and the oldest first.
        blank = [block for block in fresh if block not in self.kept]
        evicted = self.kept[: max(0, num_fresh - len(blank))]
        assert set(table[len(found) :]) <= {*blank, *evicted}
        self.kept = self.kept[len(evicted) :]
        self.unshare(evicted)

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def reuse(self, index: int) -> None:
        """Before a chunk of a prompt is cut: what others have computed by now takes its place."""
        seq, size = one_of(self.running, index), self.limits.block_size
        if seq.decodes or seq.cache_len >= seq.num_prompt_tokens:
            return
        begin, inside = divmod(seq.cache_len, size)
        found: list[int] = []
        if not (inside or seq.params.prompt_logprobs or seq in self.hurt):
            for prefix in self.prefixes(seq, seq.num_prompt_tokens - 1)[begin:]:
                if prefix not in self.shareable:
                    break
                found.append(self.shareable[prefix])
        table, end = self.cache.table(seq), begin + len(found)
        expected = [*table[:begin], *found, *table[end:]]
        self.cache.reuse(seq)
        assert self.cache.table(seq) == expected
        assert (self.cache.table(seq) is table) == (not found)
        if found:
            assert seq.cache_len == end * size
            self.num_saved += len(found) * size
            self.num_offered[seq] = end
            self.kept = [block for block in self.kept if block not in found]

    @precondition(lambda self: self.running)
    @rule(index=indices, num_tokens=st.integers(1, 12), next_token=tokens)
    def run(self, index: int, num_tokens: int, next_token: int) -> None:
        """A step with a chunk of one sequence, after which a token is drawn if it ends there."""
        seq = one_of(self.running, index)
        end = min(seq.cache_len + num_tokens, seq.num_tokens)
        for position in range(seq.cache_len, end):
            number, offset = divmod(position, self.limits.block_size)
            block = self.cache.table(seq)[number]
            assert self.holders(block) == [seq]
            assert block not in self.shareable.values()
            self.memory[block][offset] = seq.token_ids[position]
        seq.cache_len = end
        self.cache.computed(seq)
        if self.limits.share_prefixes and seq not in self.hurt:
            full = list(zip(self.prefixes(seq, end), self.cache.table(seq), strict=False))
            for prefix, block in full[self.num_offered[seq] :]:
                self.shareable.setdefault(prefix, block)
            self.num_offered[seq] = max(self.num_offered[seq], len(full))
        if end == seq.num_tokens and seq.num_completion_tokens < seq.params.max_tokens:
            seq.append(next_token)

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def run_to_the_end(self, index: int) -> None:
        seq = one_of(self.running, index)
        while seq.cache_len < seq.num_tokens:
            self.run(index, 5, 0)

    @precondition(lambda self: self.running)
    @rule(index=indices, happens=st.sampled_from([False, False, True]))
    def hurt_one(self, index: int, happens: bool) -> None:
        """A fault: what the sequence alone holds may be anything."""
        if not happens:  # most often: or else little is left to share
            return
        seq = one_of(self.running, index)
        self.hurt.add(seq)
        for block in self.cache.table(seq):
            if self.holders(block) == [seq]:
                self.memory[block] = [-1] * self.limits.block_size
        self.unshare(self.cache.table(seq))
        self.cache.forget(seq)

    @precondition(lambda self: self.running)
    @rule(index=indices)
    def free(self, index: int) -> None:
        seq = one_of(self.running, index)
        table = list(self.cache.table(seq))
        self.cache.free(seq)
        self.running.remove(seq)
        known = set(self.shareable.values())
        self.kept += [b for b in reversed(table) if b in known and not self.holders(b)]
        with pytest.raises(RuntimeError, match="does not hold slot"):
            self.cache.free(seq)

    @precondition(lambda self: len(self.running) > 1)
    @rule(index=indices)
    def free_all_but_one(self, index: int) -> None:
        left = one_of(self.running, index)
        while self.running != [left]:
            self.free(int(self.running[0] is left))

    def unshare(self, blocks: list[int]) -> None:
        self.shareable = {p: block for p, block in self.shareable.items() if block not in blocks}

    # --- what is always so ---

    @invariant()
    def the_pool_balances(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        assert self.cache.num_free == self.limits.num_slots - len(self.running)
        assert self.cache.num_free_blocks == len(self.idle())
        assert self.cache.num_reused_tokens == self.num_saved
        for seq in self.running:
            assert len(self.cache.table(seq)) == self.needs(seq)

    @invariant()
    def each_sequence_finds_its_own_tokens(self) -> None:
        for seq in self.running:
            if seq not in self.hurt:
                memory = [token for block in self.cache.table(seq) for token in self.memory[block]]
                assert memory[: seq.cache_len] == seq.token_ids[: seq.cache_len]

    @invariant()
    def what_can_be_shared_is_in_memory(self) -> None:
        for prefix, block in self.shareable.items():
            assert self.memory[block] == list(prefix[-self.limits.block_size :])

    def teardown(self) -> None:
        while self.running:
            self.free(0)
            self.the_pool_balances()
        if hasattr(self, "cache"):
            assert self.cache.num_free == self.limits.num_slots
            assert self.cache.num_free_blocks == self.limits.num_blocks


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(
    max_examples=400,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
