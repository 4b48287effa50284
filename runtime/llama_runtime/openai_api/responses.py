"""Completions as the bodies that OpenAI's API answers with.

Source: the response types of the ``openai`` package, with which the tests read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from llama_runtime.completion import Completion
from llama_runtime.errors import CaravanError
from llama_runtime.openai_api.logprobs import (
    chat_logprobs,
    completion_logprobs,
    completion_offsets,
    echoed,
    prompt_offsets,
)
from llama_runtime.openai_api.requests import Prepared
from llama_runtime.sequence import TokenLogprob


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer begins with.

    Attributes:
        id: "chatcmpl-..." or "cmpl-...", which no other answer has.
        created: when, in whole seconds since 1970.
        model: the model's name.
        fingerprint: what tells one build of the model from another, or None.
    """

    id: str
    created: int
    model: str
    fingerprint: str | None = None

    def body(self, kind: str) -> dict[str, object]:
        """The fields of an object.

        Args:
            kind: what OpenAI calls it, such as "chat.completion".
        """
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def answer_body(
    prepared: Prepared,
    completions: Seq[Seq[Completion]],
    head: Head,
    reused: int | None = None,
) -> dict[str, object]:
    """The answer to a call of either kind.

    Args:
        prepared: the call.
        completions: those of each of its prompts, in any order, as the engine made them.
        head: how the answer begins.
        reused: prompt tokens that needn't be computed; None leaves them out, where an answer must
            not depend on what else has run.

    Raises:
        CaravanError: one of them ended with an error, which is this one, said of the body.
    """
    if prepared.request.kind == "chat":
        return chat_body(prepared, completions[0], head, reused)
    return completion_body(prepared, completions, head, reused)


def chat_body(
    prepared: Prepared, completions: Seq[Completion], head: Head, reused: int | None = None
) -> dict[str, object]:
    """The answer to a chat, a ``chat.completion``.

    Args:
        prepared: the call.
        completions: all of the call, as the engine made them.
        head: how the answer begins.
        reused: as for ``answer_body``.

    Raises:
        CaravanError: as for ``answer_body``.
    """
    samples = _whole(prepared, completions, 0)
    return head.body("chat.completion") | {
        "choices": [_chat_choice(prepared, one) for one in samples],
        "usage": usage(prepared, [samples], reused),
    }


def completion_body(
    prepared: Prepared,
    completions: Seq[Seq[Completion]],
    head: Head,
    reused: int | None = None,
) -> dict[str, object]:
    """The answer to a completion, a ``text_completion``.

    Args:
        prepared: the call.
        completions: as for ``answer_body``.
        head: how the answer begins.
        reused: as for ``answer_body``.

    Raises:
        CaravanError: as for ``answer_body``.
    """
    several = [_whole(prepared, some, number) for number, some in enumerate(completions)]
    return head.body("text_completion") | {
        "choices": [
            _completion_choice(prepared, one, number)
            for number, samples in enumerate(several)
            for one in samples
        ],
        "usage": usage(prepared, several, reused),
    }


def usage(
    prepared: Prepared, completions: Iterable[Seq[Completion]], reused: int | None = None
) -> dict[str, object]:
    """The tokens of a call; those of a prompt count once, however many samples it has.

    Args:
        prepared: the call.
        completions: of each prompt.
        reused: as for ``answer_body``.
    """
    generated = sum(len(one.token_ids) for some in completions for one in some)
    return usage_body(prepared, generated, reused)


def usage_body(prepared: Prepared, generated: int, reused: int | None = None) -> dict[str, object]:
    """The same, of so many tokens that the engine made."""
    prompt = sum(map(len, prepared.prompts))
    generated = generated if prepared.request.generates else 0
    found: dict[str, object] = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }
    return found if reused is None else found | {"prompt_tokens_details": {"cached_tokens": reused}}


def _whole(prepared: Prepared, completions: Seq[Completion], number: int) -> list[Completion]:
    """All samples of one prompt in their order, none of which failed."""
    for one in completions:
        if one.error is not None:
            raise prepared.explained(one.error, number)
        if one.finish_reason not in ("stop", "length"):
            raise CaravanError("the request was given up before it ended")
    return sorted(completions, key=lambda one: one.sample)


def _chat_choice(prepared: Prepared, completion: Completion) -> dict[str, object]:
    message: dict[str, object] = {"role": "assistant", "content": completion.text, "refusal": None}
    reason: str = completion.finish_reason
    if prepared.use is not None and prepared.use.tools:
        completion = completion.with_tool_calls(prepared.use)
        message["content"] = completion.content
        if completion.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in completion.tool_calls]
            reason = "tool_calls"
    logprobs: dict[str, object] | None = None
    if completion.logprobs is not None:
        content = chat_logprobs(prepared.tokenizer, completion.logprobs)
        logprobs = {"content": content, "refusal": None}
    return {
        "index": completion.sample,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": reason,
    }


def _completion_choice(
    prepared: Prepared, completion: Completion, number: int
) -> dict[str, object]:
    request, tokenizer = prepared.request, prepared.tokenizer
    text = echoed(tokenizer, request.prompts[number]) if request.echo else ""
    logprobs: dict[str, object] | None = None
    if completion.logprobs is not None:
        items: list[TokenLogprob | None] = []
        token_ids: list[int] = []
        offsets: list[int] = []
        if request.echo:
            token_ids += prepared.prompts[number]
            items += completion.prompt_logprobs or []
            offsets += prompt_offsets(tokenizer, text, token_ids)
        if request.generates:
            token_ids += completion.token_ids
            items += completion.logprobs
            offsets += completion_offsets(tokenizer, completion, len(text))
        logprobs = completion_logprobs(tokenizer, items, token_ids, offsets)
    return {
        "index": number * request.params.n + completion.sample,
        "text": text + completion.text if request.generates else text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason if request.generates else "length",
    }
