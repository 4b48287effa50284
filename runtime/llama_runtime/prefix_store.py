"""Blocks of prompts that are kept outside the slots, so that later prompts needn't compute them."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, Protocol

from llama_runtime.contract import CHUNK_MULTIPLE, last_chunk_start
from llama_runtime.prefixes import block_hashes
from llama_runtime.sequence import Sequence


class BlockCopier(Protocol):
    """Copies keys and values between slots and kept blocks; a ``Backend`` does."""

    def save_block(self, slot: int, start: int, block: int) -> None:
        """Copy ``CHUNK_MULTIPLE`` tokens of a slot, from ``start`` on, into a block."""

    def load_block(self, slot: int, start: int, block: int) -> None:
        """Copy a block to where its tokens belong in a slot."""


class _Kept(NamedTuple):
    """A block that is kept.

    Attributes:
        block: which one of the copier's.
        before: the hash of the block that precedes it; None if it is a prompt's first.
    """

    block: int
    before: bytes | None


class PrefixStore:
    """Which blocks of which prompts are kept, least recently used first.

    What is kept was computed in chunks that begin and end at multiples of ``CHUNK_MULTIPLE``, and
    so are the same bits whoever computed them. Only what lies before a prompt's last chunk is: that
    one must run whole, and in two lengths of 32 only would it fill a block.

    A block is of no use without those before it, so of a chain its head counts as more recently
    used than its tail, which goes first.

    Invariants, executable in ``check``: a block is free or kept, once; what precedes a kept block
    is kept too, and more recently used.

    Args:
        num_blocks: how many blocks the copier has.
        copier: moves what is in them.
    """

    def __init__(self, num_blocks: int, copier: BlockCopier) -> None:
        self.num_blocks = num_blocks
        self._copier = copier
        self._free = list(reversed(range(num_blocks)))
        self._kept: OrderedDict[bytes, _Kept] = OrderedDict()  # least recently used first
        # Of each prompt under way, how many blocks had their chance to be kept. Each has one: two
        # long prompts would else throw each other's blocks out in every step.
        self._offered: dict[Sequence, int] = {}

    @property
    def num_kept(self) -> int:
        """Blocks that a prompt could begin with."""
        return len(self._kept)

    def reuse(self, seq: Sequence) -> int:
        """Copy to a prompt's slot what is kept of what it computes next; ``cache_len`` moves.

        Returns:
            By how many tokens.
        """
        if seq.params.prompt_logprobs or seq.slot is None:  # all of whose rows must be computed
            return 0
        hashes, begin = _hashes(seq), seq.cache_len // CHUNK_MULTIPLE
        end = begin
        while end < len(hashes) and hashes[end] in self._kept:
            self._copier.load_block(seq.slot, end * CHUNK_MULTIPLE, self._kept[hashes[end]].block)
            end += 1
        if end > begin:
            self._touch(hashes[:end])
            self._offered[seq] = end
            seq.cache_len = end * CHUNK_MULTIPLE
        return (end - begin) * CHUNK_MULTIPLE

    def next_block(self, seq: Sequence) -> bytes | None:
        """What identifies the block that a prompt computes next; None if it won't be kept."""
        hashes, place = _hashes(seq), seq.cache_len // CHUNK_MULTIPLE
        if seq.params.prompt_logprobs or place >= len(hashes):
            return None
        return hashes[place]

    def computed(self, seq: Sequence) -> None:
        """Keep what a prompt has computed since the last time."""
        if seq.slot is None:
            return
        hashes, begin = _hashes(seq), self._offered.get(seq, 0)
        end = min(seq.cache_len // CHUNK_MULTIPLE, len(hashes))
        if end <= begin:
            return
        self._offered[seq] = end
        self._touch(hashes[:begin])  # or else they might be thrown out for those that follow
        for place in range(begin, end):
            if not self._keep(seq.slot, hashes, place):
                break
        self._touch(hashes[:end])

    def forget(self, seq: Sequence) -> None:
        """Drop a prompt's blocks and all that rest on them, whoever computed them.

        After a fault they may hold anything. Which of them is to blame isn't known: one who was
        given up before the fault showed may have left it to this one.
        """
        doubtful = set(_hashes(seq))
        for digest, kept in reversed(list(self._kept.items())):  # what precedes comes first
            if digest in doubtful or kept.before in doubtful:
                doubtful.add(digest)
                self._drop(digest)
        seq.block_hashes = []  # what it computes from here on rests on them

    def release(self, seq: Sequence) -> None:
        """Learn that a sequence gives its slot back; what it computed stays."""
        self._offered.pop(seq, None)

    def check(self) -> None:
        """Raise if blocks don't balance, or one is kept that nobody could reach.

        Raises:
            RuntimeError: an invariant is broken, which is a defect of Caravan.
        """
        blocks = sorted([*self._free, *(kept.block for kept in self._kept.values())])
        if blocks != list(range(self.num_blocks)):
            raise RuntimeError(f"kept blocks don't balance: {blocks}, of which {self._free} free")
        seen: set[bytes | None] = {None}
        for digest, kept in reversed(self._kept.items()):
            if kept.before not in seen:
                raise RuntimeError(f"block {kept.block} is kept longer than what precedes it")
            seen.add(digest)
        if any(seq.slot is None for seq in self._offered):
            raise RuntimeError("a prompt that has ended is remembered")

    def _keep(self, slot: int, hashes: list[bytes], place: int) -> bool:
        """Keep a block of a slot, unless it is; False if neither it nor what follows can be."""
        digest = hashes[place]
        if digest in self._kept:  # of somebody who computed the same
            self._kept.move_to_end(digest)
            return True
        before = hashes[place - 1] if place else None
        if before is not None and before not in self._kept:
            return False
        if not self._free:
            oldest = next(iter(self._kept), None)
            if oldest is None or oldest in hashes[:place]:
                return False  # the prompt is longer than all that can be kept
            self._drop(oldest)
        block = self._free.pop()
        self._copier.save_block(slot, place * CHUNK_MULTIPLE, block)
        self._kept[digest] = _Kept(block, before)
        return True

    def _touch(self, hashes: list[bytes]) -> None:
        """Count a chain as used now: the head last, so that it stays the longest."""
        for digest in reversed(hashes):
            if digest in self._kept:
                self._kept.move_to_end(digest)

    def _drop(self, digest: bytes) -> None:
        self._free.append(self._kept.pop(digest).block)


def _hashes(seq: Sequence) -> list[bytes]:
    """Those of the blocks before a prompt's last chunk."""
    last = last_chunk_start(seq.num_prompt_tokens) // CHUNK_MULTIPLE
    return block_hashes(seq, CHUNK_MULTIPLE)[:last]
