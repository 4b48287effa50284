"""One token stream: everything about it lives here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from llama_runtime.detokenizer import Detokenizer
from llama_runtime.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what has been generated for it.

    Invariants: ``0 <= cache_len <= num_tokens``; a slot is held exactly while the sequence runs;
    ``finish_reason`` is set once, and nothing is appended after it.

    Attributes:
        id: unique within its engine, in order of arrival.
        token_ids: prompt tokens, then completion tokens.
        num_prompt_tokens: how many of them are the prompt.
        params: what the caller asked for.
        seed: key of its random stream.
        detokenizer: turns its completion into text, token by token.
        cache_len: tokens whose keys and values are in the cache.
        slot: its row of the cache, None while it waits and after it ended.
        finish_reason: None while it goes on.
    """

    id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    detokenizer: Detokenizer
    cache_len: int = 0
    slot: int | None = None
    finish_reason: FinishReason | None = field(default=None)

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens so far."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far; also the index of the next draw in its random stream."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The tokens generated so far, an end token included."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def decodes(self) -> bool:
        """Whether its newest token alone is missing from the cache; also for a prompt of one."""
        return self.cache_len == len(self.token_ids) - 1
