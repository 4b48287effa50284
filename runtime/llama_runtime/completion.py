"""What a caller asks, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from llama_runtime.errors import CaravanError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import FinishReason, Sequence, TokenLogprob
from llama_runtime.tool_calls import ToolCall
from llama_runtime.tool_use import ToolUse

Prompt = str | Seq[int]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        prompt: raw text, or token ids, which are taken as they are.
        params: how to continue it.
    """

    prompt: Prompt
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one request.

    Attributes:
        text: the completion, without its end token.
        token_ids: what was generated, an end token included.
        finish_reason: "stop", "length" or "error".
        num_prompt_tokens: length of the prompt; 0 if it never became tokens.
        seed: the random stream in use: the same request with this seed gives the same text.
        error: what went wrong, if ``finish_reason`` is "error".
        sample: which of the ``n`` completions of the request this is, from 0.
        stop_text: the text of ``stop`` that ended it, or None.
        logprobs: of each token of ``token_ids``; None unless they were asked for.
        prompt_logprobs: of each token of the prompt, None for the first, which nothing precedes;
            None unless they were asked for.
        tool_calls: what an answer to a request with tools calls, in order.
        content: what such an answer says beside its calls; None if there is nothing else.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_prompt_tokens: int = 0
    seed: int | None = None
    error: CaravanError | None = None
    sample: int = 0
    stop_text: str | None = None
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    content: str | None = None

    @classmethod
    def of(cls, seq: Sequence, text: str, last: TokenEvent) -> Completion:
        """What became of a sequence that ended.

        Args:
            seq: the sequence.
            text: the texts of all its events.
            last: the event that ended it.
        """
        return cls(
            text=text,
            token_ids=seq.completion_token_ids,
            finish_reason=last.finish_reason or "error",
            num_prompt_tokens=seq.num_prompt_tokens,
            seed=seq.seed,
            error=last.error,
            sample=seq.sample,
            stop_text=seq.stop_texts.found,
            logprobs=seq.logprobs if seq.params.logprobs else None,
            prompt_logprobs=seq.prompt_logprobs if seq.params.prompt_logprobs else None,
        )

    def with_tool_calls(self, use: ToolUse) -> Completion:
        """The same, taken apart into what it says and what it calls."""
        if not use.tools:
            return self
        answer = use.read(self.text, is_whole=self.finish_reason == "stop")
        return replace(self, content=answer.content, tool_calls=answer.tool_calls)
