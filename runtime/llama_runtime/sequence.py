"""One token stream: everything about it lives here and nowhere else."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from llama_runtime.detokenizer import Detokenizer
from llama_runtime.grammars import Matcher
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_lookup import PromptLookup
from llama_runtime.stop_texts import StopTexts
from llama_runtime.token_counts import TokenCounts

FinishReason = Literal["stop", "length", "abort", "error"]


class Origin(TypedDict, total=False):
    """Where a sequence comes from; each may be left out.

    Attributes:
        sample: which of the ``n`` completions of a request it is, from 0.
        seed: its random stream where ``params`` name none; None draws a fresh one.
        caller: whose it is where ``params`` don't say; see ``WaitingQueue``.
        streamed: whether somebody reads its tokens as they come: then steps of prompts are short
            while it runs.
    """

    sample: int
    seed: int | None
    caller: Hashable
    streamed: bool


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model itself found a token, before bias, penalties, temperature and filters.

    Attributes:
        token_id: the token.
        logprob: the natural logarithm of its probability.
        top: the likeliest tokens at its place with theirs, likeliest first, as many as were asked
            for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
        stop_texts: holds that text back where it may be the beginning of a stop text.
        sample: which of the ``n`` completions of a request it is, from 0; the random stream's
            other key.
        kind: which branch of the sampler its rows take; see ``sampling_kind``.
        cache_len: tokens whose keys and values are in the cache, or will be when the steps that
            were launched have run.
        num_pending: tokens that were sampled by steps that were launched, and aren't known yet.
        slot: its row of the cache, None while it waits and after it ended.
        finish_reason: None while it goes on.
        logprobs: of the completion's tokens, if they are asked for.
        prompt_logprobs: of the prompt's tokens so far, if they are asked for; None for the first,
            which nothing precedes.
        counts: its tokens as the penalties need them.
        edited: whether its logits are changed before a token is chosen.
        scored: whether log-probabilities are asked for, of the prompt or of the completion.
        max_tokens: the most tokens it may have, prompt and completion.
        caller: whose it is; see ``WaitingQueue``.
        streamed: whether somebody reads its tokens as they come, and would see them stall.
        arrived: when it was queued, by the engine's clock, in seconds.
        started: when it got its slot, by the same clock; None until then.
        deadline: when it has to have ended, by the same clock, or None.
        lookup: guesses its next tokens; None where they aren't guessed.
        matcher: what its completion is held to, and where it is in that; None for nothing.
        block_hashes: of the full blocks of its prompt, once somebody asked; see ``prefixes``.
        num_reused: prompt tokens that it was spared.
    """

    id: int
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    seed: int
    detokenizer: Detokenizer
    stop_texts: StopTexts = field(default_factory=StopTexts)
    sample: int = 0
    kind: int = 0
    cache_len: int = 0
    num_pending: int = 0
    slot: int | None = None
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    caller: Hashable = None
    streamed: bool = False
    arrived: float = 0.0
    started: float | None = None
    deadline: float | None = None
    lookup: PromptLookup | None = None
    matcher: Matcher | None = None
    block_hashes: list[bytes] | None = None
    num_reused: int = 0
    counts: TokenCounts | None = field(init=False, default=None)
    edited: bool = field(init=False)
    scored: bool = field(init=False)
    max_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        if params.penalized:
            self.counts = TokenCounts(self.token_ids)
        self.edited = params.penalized or bool(params.logit_bias) or params.min_tokens > 0
        self.scored = params.logprobs or params.prompt_logprobs
        self.max_tokens = self.num_prompt_tokens + params.max_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens so far."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens generated so far, those that are pending left out."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def draw_index(self) -> int:
        """The index of the next draw in its random stream."""
        return len(self.token_ids) + self.num_pending - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The tokens generated so far, an end token included."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def decodes(self) -> bool:
        """Whether its newest token alone is missing from the cache; also for a prompt of one."""
        return self.cache_len == len(self.token_ids) + self.num_pending - 1

    @property
    def is_full(self) -> bool:
        """Whether the pending tokens are its last ones, whatever they are."""
        return len(self.token_ids) + self.num_pending >= self.max_tokens

    def append(self, token_id: int) -> None:
        """Add a token to the completion."""
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)
        if self.lookup is not None:
            self.lookup.add(token_id)
