"""Answers as the chunks that OpenAI's API streams.

All chunks of a choice put together say what ``answer_body`` says of it. Where a chat has tools,
text is held back from where a call may begin until the answer ends, because only the whole of it
tells a call from JSON that looks like one; what comes before is streamed as any text.

Source: the chunk types of the ``openai`` package, with which the tests read them.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

from llama_runtime.events import TokenEvent
from llama_runtime.openai_api.logprobs import (
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    echoed,
    prompt_offsets,
)
from llama_runtime.openai_api.requests import Prepared
from llama_runtime.openai_api.responses import Head, usage_body
from llama_runtime.sequence import TokenLogprob
from llama_runtime.tool_calls import settled_content

# ASCII, since some readers of events take other characters for line ends.
encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Chunks:
    """The chunks of one call as JSON, from the events of its sequences.

    What all chunks begin with becomes JSON once: that is most of a chunk, and of the time it takes.

    Args:
        prepared: the call.
        head: how every chunk begins.

    Attributes:
        num_generated: tokens that the engine has made so far.
    """

    def __init__(self, prepared: Prepared, head: Head) -> None:
        self._prepared = prepared
        is_chat = prepared.request.kind == "chat"
        fields = head.body("chat.completion.chunk" if is_chat else "text_completion")
        self._head = encode(fields).removesuffix("}") + ',"choices":['
        self._shows_usage = prepared.request.include_usage
        self._tail = '],"usage":null}' if self._shows_usage else "]}"
        self._choices: dict[tuple[int, int], _ChatChoice | _CompletionChoice] = {}
        self.num_generated = 0

    def take(
        self, number: int, event: TokenEvent, prompt_logprobs: list[TokenLogprob | None]
    ) -> Iterator[str]:
        """The chunks that an event makes, if any.

        Args:
            number: the prompt that it is about, from 0.
            event: without an error.
            prompt_logprobs: of that prompt's tokens; they are there with its first event.
        """
        self.num_generated += event.token_id is not None
        key = number, event.sample
        if (choice := self._choices.get(key)) is None:
            choice = self._choices[key] = self._begun(number)
            for part in choice.begin(prompt_logprobs):
                yield self._chunk(number, event.sample, part)
        for part in choice.take(event):
            yield self._chunk(number, event.sample, part)

    def end(self, reused: int | None = None) -> Iterator[str]:
        """The chunks after all choices: the usage, if it was asked for.

        Args:
            reused: as for ``answer_body``.
        """
        if self._shows_usage:
            usage = usage_body(self._prepared, self.num_generated, reused)
            yield f'{self._head}],"usage":{encode(usage)}}}'

    def _begun(self, number: int) -> _ChatChoice | _CompletionChoice:
        if self._prepared.request.kind == "chat":
            return _ChatChoice(self._prepared)
        return _CompletionChoice(self._prepared, number)

    def _chunk(self, number: int, sample: int, part: dict[str, Any]) -> str:
        index = number * self._prepared.params.n + sample
        return self._head + encode({"index": index, **part}) + self._tail


class _ChatChoice:
    """The parts of one choice of a chat: role, content, calls, the reason of its end."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        use = prepared.use
        self._use = use if use is not None and use.tools else None
        self._text = ""  # all of it, where there are tools
        self._num_given = 0  # characters of it
        self._entries: list[TokenLogprob] = []

    def begin(self, _prompt_logprobs: object) -> Iterator[dict[str, Any]]:
        yield self._part({"role": "assistant", "content": "", "refusal": None})

    def take(self, event: TokenEvent) -> Iterator[dict[str, Any]]:
        if event.logprob is not None:
            self._entries.append(event.logprob)
        is_last = event.finish_reason is not None
        text, calls = event.text, []
        if self._use is not None:
            self._text += event.text
            text = "" if is_last else self._settled()
        if self._use is not None and is_last:
            read = self._use.read(self._text, is_whole=event.finish_reason == "stop")
            text = (read.content or "")[self._num_given :]
            calls = [call.as_dict() for call in read.tool_calls]
        if text or (self._entries and is_last):
            yield self._part({"content": text})
        if calls:
            numbered = [{"index": index, **call} for index, call in enumerate(calls)]
            yield self._part({"tool_calls": numbered})
        if is_last:
            yield self._part({}, "tool_calls" if calls else event.finish_reason)

    def _settled(self) -> str:
        """What is content whatever comes, and wasn't given yet."""
        assert self._use is not None
        start, self._num_given = (
            self._num_given,
            max(self._num_given, settled_content(self._text, self._use.dialect)),
        )
        return self._text[start : self._num_given]

    def _part(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        """A part, with the log-probabilities of what was generated since the one before."""
        logprobs: dict[str, object] | None = None
        if self._entries:
            entries = chat_logprobs(self._prepared.tokenizer, self._entries)
            logprobs = {"content": entries, "refusal": None}
            self._entries = []
        return {"delta": delta, "logprobs": logprobs, "finish_reason": reason}


class _CompletionChoice:
    """The parts of one choice of a completion: its prompt, if that is echoed, and its text."""

    def __init__(self, prepared: Prepared, number: int) -> None:
        self._prepared = prepared
        self._number = number
        request = prepared.request
        self._echo = echoed(prepared.tokenizer, request.prompts[number]) if request.echo else ""
        self._length = len(self._echo)  # of the text so far
        self._offsets = TextOffsets(prepared.tokenizer, self._length)
        self._waiting: deque[tuple[TokenLogprob, int]] = deque()  # whose text hasn't come yet

    def begin(self, prompt_logprobs: list[TokenLogprob | None]) -> Iterator[dict[str, Any]]:
        request, tokenizer = self._prepared.request, self._prepared.tokenizer
        if not request.echo:
            return
        logprobs: dict[str, object] | None = None
        if self._prepared.params.prompt_logprobs:
            token_ids = self._prepared.prompts[self._number]
            offsets = list(prompt_offsets(tokenizer, self._echo, token_ids))
            logprobs = completion_logprobs(tokenizer, prompt_logprobs, token_ids, offsets)
        yield {"text": self._echo, "logprobs": logprobs, "finish_reason": None}

    def take(self, event: TokenEvent) -> Iterator[dict[str, Any]]:
        reason = event.finish_reason
        if not self._prepared.request.generates:
            if reason is not None:
                yield {"text": "", "logprobs": None, "finish_reason": "length"}
            return
        if event.logprob is not None:
            self._waiting.append((event.logprob, self._offsets.push(event.logprob.token_id)))
        self._length += len(event.text)
        logprobs = self._logprobs(is_last=reason is not None)
        if event.text or logprobs or reason is not None:
            yield {"text": event.text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, *, is_last: bool) -> dict[str, object] | None:
        """Those of the tokens whose text has begun.

        A stop text may still cut off that of the others, and with it where they are.
        """
        items: list[TokenLogprob] = []
        offsets: list[int] = []
        while self._waiting and (is_last or self._waiting[0][1] < self._length):
            item, offset = self._waiting.popleft()
            items.append(item)
            offsets.append(min(offset, self._length))
        if not items:
            return None
        token_ids = [item.token_id for item in items]
        return completion_logprobs(self._prepared.tokenizer, items, token_ids, offsets)
