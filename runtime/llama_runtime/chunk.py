"""What one sequence runs in a step, and how much of a prompt that is."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from llama_runtime.contract import CHUNK_MULTIPLE, last_chunk_start
from llama_runtime.sequence import Sequence


class Chunk:
    """The next tokens of one sequence.

    Args:
        seq: a running sequence.
        num_tokens: how many of its tokens, from ``seq.cache_len`` on, run in this step.
        draft: guesses at the tokens after the newest one, which run too.

    Attributes:
        num_tokens: how many tokens run, guesses included.
        num_sampled: how many of its last rows a token is drawn from: none unless the chunk holds
            the newest token; else that one's and those of the guesses.
    """

    __slots__ = ("draft", "num_sampled", "num_tokens", "seq")

    def __init__(self, seq: Sequence, num_tokens: int, draft: Seq[int] = ()) -> None:
        self.seq = seq
        self.draft = draft
        self.num_tokens = num_tokens + len(draft)
        reaches_newest = seq.cache_len + num_tokens == len(seq.token_ids) + seq.num_pending
        self.num_sampled = 1 + len(draft) if reaches_newest else 0

    @property
    def samples(self) -> bool:
        """Whether a token is drawn from it."""
        return self.num_sampled > 0

    @property
    def num_scored(self) -> int:
        """How many of its first rows score the prompt's next tokens, if that is asked for."""
        if not self.seq.params.prompt_logprobs:
            return 0
        return max(0, min(self.num_tokens, self.seq.num_prompt_tokens - 1 - self.seq.cache_len))


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
