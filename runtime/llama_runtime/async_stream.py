"""One request as its events come, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from types import TracebackType

from llama_runtime.admission import Accepted, Ticket
from llama_runtime.async_calls import Deadline, Source, encoded
from llama_runtime.events import TokenEvent
from llama_runtime.mailbox import Mailbox, call_soon
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.worker import Worker


class AsyncStream:
    """Iterates over the events of one request, an event a token of one of its samples.

    It begins with the first event that is asked for, with ``start``, or with ``async with``. The
    slot is given back when it ends: with the last event, an error, ``aclose``, the end of ``async
    with``, the cancellation of a task that waits for an event, or with the object itself. Whoever
    leaves the loop early while a name still refers to the stream should close it.

    Args:
        worker: runs it.
        source: the prompt.
        params: how to continue it.
        deadline: when it has to be done.
        owner: kept from being collected as garbage, and so closed, as long as this is used.
        turn: when it has to have a slot.
        streamed: whether somebody reads its tokens as they come.
    """

    def __init__(
        self,
        worker: Worker,
        source: Source,
        params: SamplingParams,
        deadline: Deadline,
        owner: object,
        *,
        turn: Deadline | None = None,
        streamed: bool = True,
    ) -> None:
        self._worker = worker
        self._source = source
        self._params = params
        self._deadline = deadline
        self._owner = owner
        self._turn = turn or Deadline(None)
        self._streamed = streamed
        self._ticket: Ticket | None = None
        self._timers: list[tuple[asyncio.AbstractEventLoop, asyncio.TimerHandle]] = []
        self._sequences: tuple[Sequence, ...] = ()
        self._going: set[int] = set()
        self._ended = False

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """What it runs, one for each sample; none before the request has started.

        The worker's thread goes on while they are read: each attribute is true by itself.
        """
        return self._sequences

    @property
    def seed(self) -> int | None:
        """The random stream in use: the same request with this seed gives the same text.

        None before the request has started.
        """
        return self._sequences[0].seed if self._sequences else None

    @property
    def num_prompt_tokens(self) -> int | None:
        """Length of the prompt; None before the request has started."""
        return self._sequences[0].num_prompt_tokens if self._sequences else None

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        """Those of the prompt's tokens, once the first event is there; if they are asked for."""
        return self._sequences[0].prompt_logprobs if self._sequences else []

    async def start(self, submitted: Callable[[], object] = lambda: None) -> None:
        """Wait until the request is accepted, so that a wrong one is told before any answer.

        A second call does nothing.

        Args:
            submitted: called when the request is counted among those that wait, which may be a
                step before it is accepted.

        Raises:
            QueueFullError: too much waits for a slot.
            RequestError: the prompt or a parameter is wrong.
            TimeoutError: the request's timeout has passed, or it waited too long for a slot.
            BackendError: the graph failed.
            CaravanError: the LLM drains or is closed, or was loaded by the parent process.
        """
        if self._ticket is not None or self._ended:
            return
        self._mailbox = Mailbox()
        try:
            deliver = partial(self._mailbox.post, 0)
            self._ticket = self._worker.admit(deliver, streamed=self._streamed)
            async with self._deadline.kept():
                token_ids = await encoded(self._source)
            self._source = []
            self._start_timers(self._ticket)
            self._worker.submit(self._ticket, token_ids, self._params)
            submitted()
            await self._next()
        except BaseException:
            self._end()
            raise

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> TokenEvent:
        await self.start()
        if self._ended:
            raise StopAsyncIteration
        try:
            while (event := await self._next()) is None:
                pass
        except BaseException:
            self._end()
            raise
        if event.finish_reason is not None:
            self._going.discard(event.sequence_id)
            if not self._going:
                self._end()
        return event

    async def aclose(self) -> None:
        """End the request if it hasn't ended; a second call does nothing."""
        self._end()

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

    def __del__(self) -> None:
        self._end()

    async def _next(self) -> TokenEvent | None:
        """The next event; None in place of one when the request is accepted."""
        _, message = await self._mailbox.get()
        if isinstance(message, TokenEvent):
            if message.error is not None:
                raise message.error
            return message
        if isinstance(message, Accepted):
            self._sequences = message.sequences
            self._going = {seq.id for seq in self._sequences}
            return None
        raise message.with_traceback(None)  # several may be told the same error

    def _start_timers(self, ticket: Ticket) -> None:
        """Have the slot given back in time, also while nobody waits for an event."""
        loop = asyncio.get_running_loop()
        for deadline, expire in ((self._deadline, _expire), (self._turn, _give_up_waiting)):
            if deadline.left is not None:
                given = self._worker, ticket, self._mailbox, deadline
                self._timers.append((loop, loop.call_later(deadline.left, expire, *given)))

    def _end(self) -> None:
        """End the request; a finalizer calls it, in any thread."""
        self._ended = True
        if self._ticket is not None:
            self._worker.cancel(self._ticket)
        if not self._worker.forked:
            while self._timers:
                loop, timer = self._timers.pop()
                call_soon(loop, timer.cancel)


def _expire(worker: Worker, ticket: Ticket, mailbox: Mailbox, deadline: Deadline) -> None:
    worker.cancel(ticket)
    mailbox.post(0, deadline.error())


def _give_up_waiting(worker: Worker, ticket: Ticket, mailbox: Mailbox, turn: Deadline) -> None:
    """End a request none of whose samples has had a slot."""
    if not ticket.ended and ticket.waiting >= max(1, len(ticket.sequences)):
        worker.cancel(ticket)
        message = f"the request has waited {turn.timeout} s for a slot, as long as it may"
        mailbox.post(0, TimeoutError(f"{message}: try again later"))
