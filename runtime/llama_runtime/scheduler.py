"""Which tokens of which sequences run in the next step.

Continuous batching: a sequence that ends gives its slot to the next one in the same run. A step is
of one of three kinds, which take turns while there is something for each: it decodes one token of
every sequence whose prompt is in the cache, or verifies what is guessed of those that speculate, or
runs chunks of prompts. So streams wait for one step of prompts at most, which is short while
anybody watches them; the oldest prompt moves in each of those, and none waits for a later one's: a
short prompt may still be through before a long one, with what that one can't use of the budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from llama_runtime.chunk import Chunk, next_chunk
from llama_runtime.contract import MAX_CELLS, MAX_CHUNK, MAX_DRAFT, MIN_CHUNK, max_logits_rows
from llama_runtime.sequence import Sequence
from llama_runtime.waiting import WaitingQueue

_NEARLY = 8  # slots are gathered while no more than one of so many is free


class KVCache(Protocol):
    """Who owns which part of the cache; ``SlotCache`` and ``PagedCache``."""

    num_slots: int
    num_reused_tokens: int  # prompt tokens that needn't be computed, since the start
    num_prefix_hits: int  # sequences that were spared some

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""

    @property
    def use(self) -> float:
        """How much of it is held, 0 to 1."""

    def fits(self, seq: Sequence) -> bool:
        """Whether ``allocate`` would have room."""

    def allocate(self, seq: Sequence) -> None:
        """Give a sequence its slot and all the cells that it may ever need."""

    def reuse(self, seq: Sequence) -> None:
        """Move ``seq.cache_len`` over what others have computed of its prompt by now."""

    def next_block(self, seq: Sequence) -> bytes | None:
        """What identifies the block that ``seq`` computes next; None if nobody could reuse it."""

    def computed(self, seq: Sequence) -> None:
        """Learn that a step which fills the cache up to ``seq.cache_len`` has been launched."""

    def forget(self, seq: Sequence) -> None:
        """Let nobody share what a sequence wrote."""

    def free(self, seq: Sequence) -> None:
        """Take back what a sequence holds."""

    def check(self) -> None:
        """Raise a ``RuntimeError`` if it doesn't balance."""


class Scheduler:
    """Waiting -> running, and whose tokens run next.

    Args:
        cache: what running sequences hold.
        prompt_budget: the most prompt tokens of one step, so many that one always moves.
        stream_budget: the most while anybody reads tokens as they come, or twice as many as
            sequences decode if that is more: a step costs no more for a prompt's token than for a
            decoded one, so no gap between two tokens is longer than about three steps that decode.
        max_chunk: the most tokens of one prompt in one step.
        refill: whether a freed slot is given away before all others are free too; False gives
            the fixed batches that continuous batching is measured against.
        cut: how much of a prompt runs next: ``next_chunk`` by the rules of ``slots``, or
            ``any_chunk``.
        max_cells: the most cells of a step of prompts, from its lowest slot to its highest; None
            where a dialect has none.
        max_prompts: the most prompts of which one step runs chunks; None where it may be any.
        max_logits: the most rows of logits of a step of prompts, or of one that verifies; None for
            ``max_logits_rows``.
        gather: while nearly all slots are in use, so many steps run between two of prompts, so that
            the slots which become free are filled together. For where a step of one prompt takes as
            long as one of several; 0 fills them one by one.

    Attributes:
        waiting: those without a slot.
        running: those with one, in order of admission.
        limit: how many may run at once, at most the slots of the cache.
        apart: whether a step runs one sequence, in turn: the interleaving, token by token, that
            batches are measured against.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        prompt_budget: int,
        max_chunk: int,
        stream_budget: int | None = None,
        refill: bool = True,
        cut: Callable[[int, int, int], int] | None = None,
        max_cells: int | None = MAX_CELLS,
        max_prompts: int | None = None,
        max_logits: int | None = None,
        gather: int = 0,
    ) -> None:
        if cut is None and not MIN_CHUNK <= max_chunk <= MAX_CHUNK:
            raise ValueError(f"max_chunk must lie in {MIN_CHUNK} to {MAX_CHUNK}, not {max_chunk}")
        if cut is None and prompt_budget < MIN_CHUNK:
            raise ValueError(f"prompt_budget must be at least {MIN_CHUNK}, not {prompt_budget}")
        self.limit = cache.num_slots
        self._stream_budget = prompt_budget if stream_budget is None else stream_budget
        self._cut = cut or next_chunk
        self._max_cells = max_cells
        self._max_prompts = max_prompts
        self._max_logits = max_logits
        self._gather = gather
        self._num_without_prompts = 0  # steps since one ran any
        self.cache = cache
        self.prompt_budget = prompt_budget
        self.max_chunk = max_chunk
        self.refill = refill
        self.apart = False
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        self._turns = deque([self._prompt_chunks, self._decoding_chunks, self._verifying_chunks])
        self._left_out: Sequence | None = None  # of a step that verified, so first in the next one
        self._alone: deque[Chunk] = deque()  # that are to run one by one

    @property
    def has_room(self) -> bool:
        """Whether a sequence that is added now would run in the next step, memory allowing."""
        free = self.cache.num_free > 0 and len(self.running) < self.limit
        return free and not self.waiting and not self._gathers

    @property
    def _gathers(self) -> bool:
        """Whether slots that are free wait until there are more of them."""
        num_free = self.limit - len(self.running)
        return num_free <= self.limit // _NEARLY and self._num_without_prompts < self._gather

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.add(seq)

    def start(self, seq: Sequence, now: float) -> None:
        """Give a sequence its slot, which waits here or somewhere else."""
        self.cache.allocate(seq)
        self.waiting.grant(seq, now)
        seq.started = now
        self.running.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that ended, wherever it is, and free what it holds."""
        if seq.slot is None:
            self.waiting.remove(seq)
        else:
            self.withdraw(seq)
            self.cache.free(seq)

    def withdraw(self, seq: Sequence) -> None:
        """Let a running sequence run no more; what it holds stays its own."""
        self.running.remove(seq)
        self.waiting.release(seq)
        self._alone = deque(chunk for chunk in self._alone if chunk.seq is not seq)

    def schedule(self, now: float = 0.0) -> list[Chunk]:
        """The chunks of the next step; empty only if nothing runs or waits.

        Args:
            now: the time, in seconds.
        """
        if self._alone:
            return [self._alone.popleft()]
        self._admit(now)
        for _ in range(len(self._turns)):
            turn = self._turns[0]
            chunks = turn()
            self._turns.rotate(-1)
            if chunks:
                is_prompts = turn == self._prompt_chunks
                self._num_without_prompts = 0 if is_prompts else self._num_without_prompts + 1
                if self.apart:
                    self._alone.extend(chunks[1:])
                return chunks[:1] if self.apart else chunks
        return []

    def _decoding_chunks(self) -> list[Chunk]:
        """The newest token of every sequence that decodes and doesn't speculate."""
        streams = (seq for seq in self.running if seq.decodes and seq.lookup is None)
        return [Chunk(seq, 1) for seq in streams if not seq.is_full]

    def _verifying_chunks(self) -> list[Chunk]:
        """The newest token and guesses at what follows it, of those that speculate.

        Those that don't fit come first in the next step of this kind. How much is guessed is never
        less for lack of room: it may depend on the sequence alone.
        """
        streams = [
            seq
            for seq in self.running
            if seq.lookup is not None and seq.decodes and not seq.num_pending
        ]
        if self._left_out in streams:
            first = streams.index(self._left_out)
            streams = streams[first:] + streams[:first]
        self._left_out = None
        chunks: list[Chunk] = []
        logits_rows, cells = self._logits_rows, _Cells(self._max_cells, width=2)  # at least
        for seq in streams:
            most = min(MAX_DRAFT, seq.max_tokens - seq.num_tokens - 1)
            chunk = Chunk(seq, 1, seq.lookup.draft(most) if seq.lookup else ())
            logits_rows -= chunk.num_sampled
            if logits_rows < 0 or not cells.take(chunk):
                self._left_out = seq
                break
            chunks.append(chunk)
        return chunks

    @property
    def _logits_rows(self) -> int:
        return self._max_logits or max_logits_rows(self.cache.num_slots)

    @property
    def _budget(self) -> int:
        """The most prompt tokens of the next step."""
        streams = [seq for seq in self.running if seq.decodes and not seq.is_full]
        if not any(seq.streamed for seq in streams):
            return self.prompt_budget
        return min(self.prompt_budget, max(self._stream_budget, 2 * len(streams)))

    def _prompt_chunks(self) -> list[Chunk]:
        """Chunks of the oldest prompts, as many as the budget and the cells of a step hold.

        A prompt whose next tokens another one of this step computes waits for them.
        """
        chunks: list[Chunk] = []
        begun: set[bytes] = set()
        budget, logits_rows, cells = self._budget, self._logits_rows, _Cells(self._max_cells)
        for seq in self.running:
            if seq.decodes or seq.slot is None:
                continue
            self.cache.reuse(seq)
            block = self.cache.next_block(seq)
            if block is not None:
                if block in begun:
                    continue
                begun.add(block)
            limit = min(budget, self.max_chunk)
            if seq.params.prompt_logprobs:
                limit = min(limit, logits_rows)
            num_tokens = self._cut(seq.cache_len, seq.num_prompt_tokens, limit)
            chunk = Chunk(seq, num_tokens)
            logits_rows -= chunk.num_scored + chunk.num_sampled
            if num_tokens == 0 or logits_rows < 0 or not cells.take(chunk):
                break  # a later prompt must not overtake this one
            chunks.append(chunk)
            if len(chunks) == self._max_prompts:
                break
            budget -= num_tokens
        return chunks

    def _admit(self, now: float) -> None:
        if (not self.refill and self.running) or self._gathers:
            return
        while len(self.running) < self.limit:
            seq = self.waiting.first()
            if seq is None or not self.cache.fits(seq):
                return  # nobody overtakes the first, which would starve behind smaller ones
            self.start(seq, now)


class _Cells:
    """The cells of a step, [B, S], from its lowest slot to its highest.

    Args:
        most: how many there may be; None if it doesn't matter.
        width: columns that there are at least.
    """

    def __init__(self, most: int | None, width: int = 1) -> None:
        self._most = most
        self._low, self._high, self._width = -1, -1, width

    def take(self, chunk: Chunk) -> bool:
        """Count a chunk; False if there are too many with it."""
        slot = chunk.seq.slot or 0
        self._low = slot if self._low < 0 else min(self._low, slot)
        self._high = max(self._high, slot)
        self._width = max(self._width, chunk.num_tokens)
        return self._most is None or (self._high - self._low + 1) * self._width <= self._most
