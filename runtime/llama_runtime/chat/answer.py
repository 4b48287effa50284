"""One answer: room for it in the context, and its tokens as they come."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from llama_runtime.errors import CapacityError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.shared_engine import Stats


class Events(Protocol):
    """The events of a request, as ``AsyncStream`` gives them."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]: ...

    def aclose(self) -> Awaitable[object]:
        """End the request if it hasn't ended."""


class Model(Protocol):
    """What a chat needs of a model."""

    @property
    def max_len(self) -> int:
        """The most tokens of a conversation and its next answer."""

    def chat_prompt(self, messages: Seq[Mapping[str, object]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""

    def stream(self, prompt: list[int], params: SamplingParams) -> Events:
        """Continue a prompt, an event a token; closing it, or cancelling who waits, ends it."""

    def stats(self) -> Stats:
        """What the model has done so far."""


@dataclass(slots=True)
class Answer:
    """An answer as it grows.

    Attributes:
        prompt: the conversation before it.
        params: how it is made; ``max_tokens`` is what the context has room for, at most.
        texts: what came so far, token by token.
        num_tokens: how many tokens came.
        seconds: from the first of them to the last.
        cut: whether it ended because it has ``max_tokens``.
    """

    prompt: list[int]
    params: SamplingParams
    texts: list[str]
    num_tokens: int = 0
    seconds: float = 0.0
    cut: bool = False

    @classmethod
    def of(
        cls, model: Model, messages: Seq[Mapping[str, object]], params: SamplingParams
    ) -> Answer:
        """The answer to a conversation, not yet begun.

        Raises:
            CapacityError: the context has no room for one.
            RequestError: the chat template refuses the messages.
        """
        prompt = model.chat_prompt(messages)
        room = model.max_len - len(prompt)
        if room < 1:
            raise CapacityError(
                f"with this message the conversation has {len(prompt)} tokens, and the context has "
                f"{model.max_len}: it was not sent; shorten it, or /undo the last exchange, or "
                "/reset",
                param="messages",
            )
        max_tokens = min(params.max_tokens, room)
        min_tokens = min(params.min_tokens, max_tokens)
        return cls(prompt, replace(params, max_tokens=max_tokens, min_tokens=min_tokens), [])

    @property
    def text(self) -> str:
        """What came so far."""
        return "".join(self.texts)

    @property
    def num_context_tokens(self) -> int:
        """Tokens of the conversation with this answer."""
        return len(self.prompt) + self.num_tokens

    async def stream(self, model: Model, show: Callable[[str], None]) -> None:
        """Let it come; what came before an error or a cancellation stays.

        Args:
            model: makes it.
            show: is given each text.

        Raises:
            CaravanError: the model failed.
        """
        started = 0.0
        async with aclosing(model.stream(self.prompt, self.params)) as events:
            async for event in events:
                now = time.monotonic()
                started = started or now
                self.seconds = now - started
                self.num_tokens += event.token_id is not None
                self.cut = event.finish_reason == "length"
                self.texts.append(event.text)
                show(event.text)
