"""Who holds which blocks of the ``paged`` dialect's cache, and which prompts share them."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from dataclasses import dataclass

from llama_runtime.prefixes import block_hashes
from llama_runtime.sequence import Sequence


@dataclass(slots=True)
class _Table:
    """What one sequence holds.

    Attributes:
        slot: its row of the step.
        blocks: its block ids, in the order of its tokens.
        chain: the content hash of each full block of its prompt; empty if nothing is shared, or
            nothing any more.
        num_offered: how many of those blocks had their chance to be registered.
    """

    slot: int
    blocks: list[int]
    chain: list[bytes]
    num_offered: int


class PagedCache:
    """A pool of blocks: sequences hold slots as in ``SlotCache``, and blocks through a table.

    A sequence gets all blocks it may ever need when it is admitted, so it can always end. Full
    blocks of a prompt are registered under a hash of all tokens up to their end, once these were
    computed, and other prompts that begin alike share them, from their admission on or as soon as
    they get there. Nobody writes into a registered block: it is full, and who shares it starts
    after it. A registered block that nobody holds keeps its content until the pool has nothing else
    to give.

    Invariants, executable in ``check``: those of ``SlotCache``; a block's count is the number of
    tables that hold it; a block of count 0 is free, once; each registration names one block.

    Args:
        num_slots: B, sequences that can run at once.
        max_len: the most tokens of one sequence.
        num_blocks: how many blocks the pool has.
        block_size: tokens of one block.
        share_prefixes: False registers nothing, so no block is ever shared.

    Attributes:
        num_reused_tokens: prompt tokens that needn't be computed, since the start.
        num_prefix_hits: sequences that were spared some.
    """

    def __init__(
        self,
        num_slots: int,
        max_len: int,
        num_blocks: int,
        block_size: int,
        *,
        share_prefixes: bool = True,
    ) -> None:
        self.num_slots = num_slots
        self.max_len = max_len
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_reused_tokens = self.num_prefix_hits = 0
        self._share_prefixes = share_prefixes
        self._free = list(range(num_slots))  # a heap: the lowest slot is handed out first
        self._tables: dict[Sequence, _Table] = {}
        self._counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks  # of registered blocks
        self._registered: dict[bytes, int] = {}
        # Free blocks: those without content, as a stack, and the registered, least recently used
        # first.
        self._blank = list(reversed(range(num_blocks)))
        self._reusable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, registered or not."""
        return len(self._blank) + len(self._reusable)

    @property
    def use(self) -> float:
        """How much of it is held, 0 to 1; what is only kept for others isn't."""
        return 1 - self.num_free_blocks / self.num_blocks

    def table(self, seq: Sequence) -> list[int]:
        """The block ids of a sequence in order: not to be altered.

        It is the same list while they are the same. When ``reuse`` exchanges some, another list
        takes its place; what steps have read or written by then stays where it was.
        """
        return self._held(seq).blocks

    def own_blocks(self, seq: Sequence) -> list[int]:
        """The blocks that a sequence shares with nobody who runs."""
        return [block for block in self._held(seq).blocks if self._counts[block] == 1]

    def fits(self, seq: Sequence) -> bool:
        """Whether ``allocate`` would succeed now."""
        shared = self._shared(seq)
        num_fresh = self._num_needed(seq) - len(shared)
        num_idle = sum(self._counts[block] == 0 for block in shared)  # free, but spoken for
        return bool(self._free) and num_fresh <= self.num_free_blocks - num_idle

    def allocate(self, seq: Sequence) -> None:
        """Give a sequence the lowest free slot, and all blocks that it may ever need.

        ``seq.cache_len`` becomes the number of prompt tokens that were found in the cache; at
        least one is left to compute.

        Raises:
            RuntimeError: the sequence doesn't fit, or runs already; nothing has changed.
        """
        if seq in self._tables or not self.fits(seq):
            raise RuntimeError(f"sequence {seq.id} can't be given a slot and blocks")
        shared = self._shared(seq)
        for block in shared:  # before fresh ones are taken, which could be these
            self._counts[block] += 1
            self._reusable.pop(block, None)
        fresh = [self._take_block() for _ in range(self._num_needed(seq) - len(shared))]
        slot = heapq.heappop(self._free)
        self._tables[seq] = _Table(slot, shared + fresh, self._chain(seq), len(shared))
        seq.slot = slot
        seq.cache_len = 0
        self._spare(seq, len(shared))

    def reuse(self, seq: Sequence) -> None:
        """Exchange the blocks that a prompt fills next for those that others have filled by now.

        ``seq.cache_len`` moves over them; at least one prompt token is left to compute. Its own,
        into which no step of it writes yet, are free again.
        """
        table = self._held(seq)
        begin, inside = divmod(seq.cache_len, self.block_size)
        if inside or seq.params.prompt_logprobs:
            return
        found = self._known(table.chain[begin : self._num_spared(seq)])
        if not found:
            return
        end = begin + len(found)
        for block in found:
            self._counts[block] += 1
            self._reusable.pop(block, None)
        own = table.blocks[begin:end]
        for block in reversed(own):
            self._counts[block] = 0
            self._blank.append(block)
        table.blocks = [*table.blocks[:begin], *found, *table.blocks[end:]]
        table.num_offered = end
        self._spare(seq, len(found))

    def next_block(self, seq: Sequence) -> bytes | None:
        """What identifies the block that ``seq`` computes next; None if nobody could reuse it."""
        chain, place = self._held(seq).chain, seq.cache_len // self.block_size
        if seq.params.prompt_logprobs or place >= len(chain):
            return None
        return chain[place]

    def computed(self, seq: Sequence) -> None:
        """Register the prompt's blocks that are full by now; ``seq.cache_len`` has advanced."""
        table = self._held(seq)
        num_full = min(seq.cache_len // self.block_size, len(table.chain))
        for i in range(table.num_offered, num_full):
            block, digest = table.blocks[i], table.chain[i]
            if digest not in self._registered:  # or else another prompt was first
                self._registered[digest] = block
                self._hashes[block] = digest
        table.num_offered = max(table.num_offered, num_full)

    def forget(self, seq: Sequence) -> None:
        """Share none of a sequence's blocks from now on: after a fault they may hold anything.

        Sequences that share one of them already keep it.
        """
        table = self._held(seq)
        for block in table.blocks:
            self._withdraw(block)
        table.chain = []  # what it computes from here on rests on them

    def free(self, seq: Sequence) -> None:
        """Take a sequence's slot and blocks back."""
        table = self._held(seq)
        # The last first, so that a chain loses its tail before its head, which all of it needs.
        for block in reversed(table.blocks):
            self._counts[block] -= 1
            if self._counts[block] == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._reusable[block] = None
        del self._tables[seq]
        heapq.heappush(self._free, table.slot)
        seq.slot = None

    def check(self) -> None:
        """Raise if slots, owners, tables and blocks don't balance.

        Raises:
            RuntimeError: an invariant is broken, which is a defect of Caravan.
        """
        slots = sorted([*self._free, *(table.slot for table in self._tables.values())])
        if slots != list(range(self.num_slots)):
            raise RuntimeError(f"slots don't balance: {slots}, of which {self._free} are free")
        for seq, table in self._tables.items():
            most = min(seq.num_tokens + seq.num_pending, self.max_len)
            if seq.slot != table.slot or not 0 <= seq.cache_len <= most:
                raise RuntimeError(f"slot {table.slot} is out of step with sequence {seq.id}")
            self._check_table(seq, table)
        counts = Counter(block for table in self._tables.values() for block in table.blocks)
        if self._counts != [counts[block] for block in range(self.num_blocks)]:
            raise RuntimeError(f"reference counts {self._counts} are not those of the tables")
        hashes = ((digest, i) for i, digest in enumerate(self._hashes) if digest is not None)
        if sorted(hashes) != sorted(self._registered.items()):
            raise RuntimeError("registrations and the hashes of blocks differ")
        idle = {block for block in range(self.num_blocks) if self._counts[block] == 0}
        kept = idle & set(self._registered.values())
        if sorted(self._blank) != sorted(idle - kept) or self._reusable.keys() != kept:
            raise RuntimeError(f"blocks {idle} are idle, not {self._blank} and {self._reusable}")

    def _check_table(self, seq: Sequence, table: _Table) -> None:
        blocks = table.blocks
        if len(set(blocks)) != len(blocks) or len(blocks) != self._num_needed(seq):
            raise RuntimeError(f"sequence {seq.id} holds the wrong blocks: {blocks}")
        num_full = min(seq.cache_len, seq.num_prompt_tokens) // self.block_size
        for i, block in enumerate(blocks):
            digest = self._hashes[block]
            if i >= num_full and (self._counts[block] > 1 or digest is not None):
                raise RuntimeError(f"block {block} of sequence {seq.id} is shared before it's full")
            if digest is not None and digest != table.chain[i]:
                raise RuntimeError(f"block {block} of sequence {seq.id} holds another's tokens")

    def _held(self, seq: Sequence) -> _Table:
        table = self._tables.get(seq)
        if table is None or table.slot != seq.slot:
            raise RuntimeError(f"sequence {seq.id} does not hold slot {seq.slot}")
        return table

    def _num_needed(self, seq: Sequence) -> int:
        return -(-(seq.num_prompt_tokens + seq.params.max_tokens) // self.block_size)

    def _num_spared(self, seq: Sequence) -> int:
        """How many full blocks a prompt may be spared: at least one token is left to compute."""
        return (seq.num_prompt_tokens - 1) // self.block_size

    def _shared(self, seq: Sequence) -> list[int]:
        """The registered blocks that a prompt begins with, if they leave it a token to compute."""
        if seq.params.prompt_logprobs:  # whose rows must all be computed
            return []
        return self._known(self._chain(seq)[: self._num_spared(seq)])

    def _known(self, chain: list[bytes]) -> list[int]:
        """The registered blocks of a chain, up to the first that isn't."""
        blocks: list[int] = []
        for digest in chain:
            if digest not in self._registered:
                break
            blocks.append(self._registered[digest])
        return blocks

    def _spare(self, seq: Sequence, num_blocks: int) -> None:
        """Count blocks that a prompt needn't compute, and move it over them."""
        num_tokens = num_blocks * self.block_size
        self.num_prefix_hits += seq.num_reused == 0 < num_tokens
        self.num_reused_tokens += num_tokens
        seq.num_reused += num_tokens
        seq.cache_len += num_tokens

    def _chain(self, seq: Sequence) -> list[bytes]:
        """What identifies each full block of a prompt; nothing if none is shared."""
        return block_hashes(seq, self.block_size) if self._share_prefixes else []

    def _take_block(self) -> int:
        """A block for new content; the least recently used registered one if there is no other."""
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._reusable.popitem(last=False)
            self._withdraw(block)
        self._counts[block] = 1
        return block

    def _withdraw(self, block: int) -> None:
        digest = self._hashes[block]
        if digest is not None:
            del self._registered[digest]
            self._hashes[block] = None
