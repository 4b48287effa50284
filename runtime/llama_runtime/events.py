"""What steps did, and what an engine has counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llama_runtime.errors import CaravanError
from llama_runtime.sequence import FinishReason, TokenLogprob


class TokenEvent(NamedTuple):
    """One token of one sequence, or its end without one.

    Attributes:
        sequence_id: as ``Engine.add`` returned it.
        token_id: the new token, or None if the sequence ended without one.
        text: the text that became complete; the texts of all events are the completion.
        finish_reason: why the sequence ended, or None if it goes on.
        error: what went wrong, if ``finish_reason`` is "error".
        logprob: how likely the model found the token, if ``logprobs`` asks for it.
        sample: which of the ``n`` completions of a request this is of, from 0.
    """

    sequence_id: int
    token_id: int | None
    text: str
    finish_reason: FinishReason | None = None
    error: CaravanError | None = None
    logprob: TokenLogprob | None = None
    sample: int = 0


class BatchDecision(NamedTuple):
    """A change of how many sequences run at once.

    Attributes:
        limit: how many, from then on.
        step: the step after which it was made, from 0.
        reason: why, in words.
    """

    limit: int
    step: int
    reason: str


@dataclass(slots=True)
class Counters:
    """What an engine has done since its start, and how full it is.

    Attributes:
        reused_tokens: prompt tokens that weren't computed, because others had them before.
        prefix_hits: sequences that were spared some.
        drafted_tokens: tokens that were guessed and verified.
        accepted_tokens: those of them that were right.
        late: sequences that ended at their deadline.
        cache_use: how much of the cache is held by sequences now, 0 to 1.
        batch_limit: how many sequences may run at once.
        batch_decisions: the last changes of that, oldest first; none where it is fixed.
    """

    reused_tokens: int = 0
    prefix_hits: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    late: int = 0
    cache_use: float = 0.0
    batch_limit: int = 0
    batch_decisions: tuple[BatchDecision, ...] = ()
