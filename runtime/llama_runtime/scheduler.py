"""Which tokens of which sequences run in the next step.

Continuous batching: a sequence that ends gives its slot to the next one in the same run. A step
either decodes one token of every sequence whose prompt is in the cache, or runs chunks of prompts;
the two take turns while there is something for both. So streams wait for one step of prompts at
most, the oldest prompt moves in each of those, and none waits for a later one's: a short prompt may
still be through before a long one, with what that one can't use of the budget.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from llama_runtime.contract import (
    CHUNK_MULTIPLE,
    MAX_CELLS,
    MAX_CHUNK,
    MIN_CHUNK,
    last_chunk_start,
    max_logits_rows,
)
from llama_runtime.sequence import Sequence


class Chunk:
    """The next tokens of one sequence.

    Args:
        seq: a running sequence.
        num_tokens: how many of its tokens, from ``seq.cache_len`` on, run in this step.

    Attributes:
        samples: whether the chunk ends at the newest token, so that the next one is drawn from it.
    """

    __slots__ = ("num_tokens", "samples", "seq")

    def __init__(self, seq: Sequence, num_tokens: int) -> None:
        self.seq = seq
        self.num_tokens = num_tokens
        self.samples = seq.cache_len + num_tokens == len(seq.token_ids) + seq.num_pending

    @property
    def num_scored(self) -> int:
        """How many of its first rows score the prompt's next tokens, if that is asked for."""
        if not self.seq.params.prompt_logprobs:
            return 0
        return max(0, min(self.num_tokens, self.seq.num_prompt_tokens - 1 - self.seq.cache_len))


class KVCache(Protocol):
    """Who owns which part of the cache; ``SlotCache`` and ``PagedCache``."""

    num_slots: int

    @property
    def num_free(self) -> int:
        """Slots that nobody holds."""

    def fits(self, seq: Sequence) -> bool:
        """Whether ``allocate`` would have room."""

    def allocate(self, seq: Sequence) -> None:
        """Give a sequence its slot and all the cells that it may ever need."""

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
        max_chunk: the most tokens of one prompt in one step.
        refill: whether a freed slot is given away before all others are free too; False gives
            the fixed batches that continuous batching is measured against.
        cut: how much of a prompt runs next: ``next_chunk`` by the rules of ``slots``, or
            ``any_chunk``.
        max_cells: the most cells of a step of prompts, from its lowest slot to its highest; None
            where a dialect has none.
        max_prompts: the most prompts of which one step runs chunks; None where it may be any.
        max_logits: the most rows of logits of a step of prompts; None for ``max_logits_rows``.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        prompt_budget: int,
        max_chunk: int,
        refill: bool = True,
        cut: Callable[[int, int, int], int] | None = None,
        max_cells: int | None = MAX_CELLS,
        max_prompts: int | None = None,
        max_logits: int | None = None,
    ) -> None:
        if cut is None and not MIN_CHUNK <= max_chunk <= MAX_CHUNK:
            raise ValueError(f"max_chunk must lie in {MIN_CHUNK} to {MAX_CHUNK}, not {max_chunk}")
        if cut is None and prompt_budget < MIN_CHUNK:
            raise ValueError(f"prompt_budget must be at least {MIN_CHUNK}, not {prompt_budget}")
        self._cut = cut or next_chunk
        self._max_cells = max_cells
        self._max_prompts = max_prompts
        self._max_logits = max_logits
        self.cache = cache
        self.prompt_budget = prompt_budget
        self.max_chunk = max_chunk
        self.refill = refill
        # In order of arrival, and each found at once: thousands may wait, and be given up.
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: list[Sequence] = []  # in order of admission
        self._prompts_turn = True

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting[seq] = None

    def remove(self, seq: Sequence) -> None:
        """Forget a sequence that ended, wherever it is, and free what it holds."""
        if seq.slot is None:
            del self.waiting[seq]
        else:
            self.withdraw(seq)
            self.cache.free(seq)

    def withdraw(self, seq: Sequence) -> None:
        """Let a running sequence run no more; what it holds stays its own."""
        self.running.remove(seq)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step; empty only if nothing runs or waits."""
        self._admit()
        decoding = [Chunk(seq, 1) for seq in self.running if seq.decodes and not seq.is_full]
        prompts = [] if decoding and not self._prompts_turn else self._prompt_chunks()
        self._prompts_turn = not prompts
        return prompts or decoding

    def _prompt_chunks(self) -> list[Chunk]:
        """Chunks of the oldest prompts, as many as the budget and the cells of a step hold."""
        chunks: list[Chunk] = []
        budget, width, low, high = self.prompt_budget, 0, self.cache.num_slots, 0
        logits_rows = self._max_logits or max_logits_rows(self.cache.num_slots)
        for seq in self.running:
            if seq.decodes or seq.slot is None:
                continue
            limit = min(budget, self.max_chunk)
            if seq.params.prompt_logprobs:
                limit = min(limit, logits_rows)
            num_tokens = self._cut(seq.cache_len, seq.num_prompt_tokens, limit)
            width, low, high = max(width, num_tokens), min(low, seq.slot), max(high, seq.slot)
            chunk = Chunk(seq, num_tokens)
            logits_rows -= chunk.num_scored + chunk.samples
            cells = (high - low + 1) * width if self._max_cells else 0
            if num_tokens == 0 or cells > (self._max_cells or 0) or logits_rows < 0:
                break  # a later prompt must not overtake this one
            chunks.append(chunk)
            if len(chunks) == self._max_prompts:
                break
            budget -= num_tokens
        return chunks

    def _admit(self) -> None:
        if not self.refill and self.running:
            return
        while self.waiting and self.cache.fits(next(iter(self.waiting))):
            seq, _ = self.waiting.popitem(last=False)
            self.cache.allocate(seq)
            self.running.append(seq)


def next_chunk(cache_len: int, num_prompt_tokens: int, limit: int) -> int:
    """How many prompt tokens run next, so that the schedule never shows in the logits.

    The last chunk starts at ``last_chunk_start`` and runs whole; earlier ones end at multiples of
    32 up to there.

    Args:
        cache_len: prompt tokens in the cache, at a border of a chunk.
        num_prompt_tokens: the prompt's length.
        limit: the most tokens that fit into the step.

    Returns:
        The chunk's length, or 0 if none that is allowed fits.
    """
    last = last_chunk_start(num_prompt_tokens)
    if cache_len >= last:
        remaining = num_prompt_tokens - cache_len
        return remaining if remaining <= limit else 0
    return min(last - cache_len, limit // CHUNK_MULTIPLE * CHUNK_MULTIPLE)


def any_chunk(cache_len: int, num_prompt_tokens: int, limit: int) -> int:
    """How many prompt tokens run next where a prompt may be cut anywhere; see ``next_chunk``."""
    return min(num_prompt_tokens - cache_len, limit)
