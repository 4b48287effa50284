"""One request as its events come, for asyncio."""

from __future__ import annotations

from types import TracebackType

from llama_runtime.async_request import AsyncRequest
from llama_runtime.events import TokenEvent
from llama_runtime.mailbox import Mailbox
from llama_runtime.sequence import Sequence, TokenLogprob


class AsyncStream:
    """Iterates over the events of one request, an event a token of one of its samples.

    It begins with the first event that is asked for, with ``start``, or with ``async with``. The
    slot is given back when it ends: with the last event, an error, ``aclose``, the end of ``async
    with``, the cancellation of a task that waits for an event, or with the object itself. Whoever
    leaves the loop early while a name still refers to the stream should close it.

    Args:
        request: that is yet to begin.
        owner: kept from being collected as garbage, and so closed, as long as this is used.
    """

    def __init__(self, request: AsyncRequest, owner: object) -> None:
        self._request = request
        self._owner = owner

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """What it runs, one for each sample; none before the request has started.

        The worker's thread goes on while they are read: each attribute is true by itself.
        """
        return self._request.sequences

    @property
    def seed(self) -> int | None:
        """The random stream in use: the same request with this seed gives the same text.

        None before the request has started.
        """
        return self.sequences[0].seed if self.sequences else None

    @property
    def num_prompt_tokens(self) -> int | None:
        """Length of the prompt; None before the request has started."""
        return self.sequences[0].num_prompt_tokens if self.sequences else None

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        """Those of the prompt's tokens, once the first event is there; if they are asked for."""
        return self._request.prompt_logprobs

    async def start(self) -> None:
        """Wait until the request is accepted, so that a wrong one is told before any answer.

        A second call does nothing.

        Raises:
            QueueFullError: too much waits for a slot.
            RequestError: the prompt or a parameter is wrong.
            TimeoutError: the request's timeout has passed, or it waited too long for a slot.
            BackendError: the graph failed.
            CaravanError: the LLM drains or is closed, or was loaded by the parent process.
        """
        if self._request.begun or self._request.ended:
            return
        self._mailbox = Mailbox()
        await self._request.begin(self._mailbox)
        while not self.sequences and not self._request.ended:
            await self._next()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> TokenEvent:
        await self.start()
        while not self._request.ended:
            if (event := await self._next()) is not None:
                return event
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the request if it hasn't ended; a second call does nothing.

        Whoever waits for an event in another task hears of no more.
        """
        self._request.end()
        if self._request.begun:
            self._mailbox.stir()

    async def __aenter__(self) -> AsyncStream:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def _next(self) -> TokenEvent | None:
        """The next event; None if it was something else that came."""
        try:
            await self._mailbox.wait()
        except BaseException:
            self._request.end()
            raise
        letter = self._mailbox.take()
        return None if letter is None else self._request.take(letter[1])
