"""One request of an event loop: its place in the queue, its deadlines, its messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

from llama_runtime.admission import Accepted, Message, Ticket
from llama_runtime.errors import RequestError
from llama_runtime.events import TokenEvent
from llama_runtime.mailbox import Mailbox, call_soon
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.worker import Worker

# Token ids, or what makes them: a tokenizer or a template that would hold up the loop.
Source = list[int] | Callable[[], list[int]]
LONGEST_TIMEOUT = 1e9  # seconds; above it there is none, so that no clock overflows


class Deadline:
    """When a request has to be done.

    Args:
        timeout: seconds from now on, or None.
        param: what the caller knows it as.

    Raises:
        RequestError: it is no number above 0.
    """

    def __init__(self, timeout: float | None, param: str = "timeout") -> None:
        self.timeout = _seconds(timeout, param)
        self._at = None if self.timeout is None else time.monotonic() + self.timeout

    @property
    def left(self) -> float | None:
        """Seconds that are left, 0 if none are; None without a timeout."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    def error(self) -> TimeoutError:
        """What is raised when it has passed."""
        return TimeoutError(f"the request took longer than its timeout of {self.timeout} s")

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Give up what is awaited inside when it has passed.

        Raises:
            TimeoutError: it has.
        """
        scope = asyncio.timeout(self.left)
        try:
            async with scope:
                yield
        except TimeoutError:
            if scope.expired():
                raise self.error() from None
            raise


class AsyncRequest:
    """One request, whose messages go to a mailbox that several may share.

    Its slot is given back when it ends: with the last event, an error, ``end``, a deadline that
    passes, also while nobody reads, or with the object itself.

    Args:
        worker: runs it.
        source: the prompt.
        params: how to continue it.
        deadline: when it has to be done; None for no time.
        turn: when it has to have a slot; None for no time.
        streamed: whether somebody reads its tokens as they come.

    Attributes:
        sequences: what it runs, one for each sample; none before it is accepted. The worker's
            thread goes on while they are read: each of their attributes is true by itself.
        params: how its prompt is continued.
        begun: whether it has had a place in the queue.
        ended: whether nothing follows.
    """

    def __init__(
        self,
        worker: Worker,
        source: Source,
        params: SamplingParams,
        *,
        deadline: Deadline | None = None,
        turn: Deadline | None = None,
        streamed: bool = False,
    ) -> None:
        self.sequences: tuple[Sequence, ...] = ()
        self.begun = self.ended = False
        self._worker = worker
        self._source = source
        self.params = params
        self._deadline = deadline or Deadline(None)
        self._turn = turn or Deadline(None)
        self._streamed = streamed
        self._ticket: Ticket | None = None
        self._timers: list[tuple[asyncio.AbstractEventLoop, asyncio.TimerHandle]] = []
        self._num_going = 0  # samples that haven't ended

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        """Those of the prompt's tokens, once the first event is there; if they are asked for."""
        return self.sequences[0].prompt_logprobs if self.sequences else []

    async def begin(self, mailbox: Mailbox, number: int = 0, within: Ticket | None = None) -> None:
        """Take a place in the queue, then make tokens of the prompt; called once.

        Args:
            mailbox: for its messages.
            number: under which they come.
            within: the call that it belongs to; see ``Worker.hold``.

        Raises:
            QueueFullError: too much waits for a slot.
            RequestError: the prompt is wrong.
            TimeoutError: the deadline has passed.
            BackendError: an earlier step failed.
            CaravanError: the worker drains or is closed, or the process is a fork.
        """
        self.begun = True
        try:
            deliver = partial(mailbox.post, number)
            self._ticket = self._worker.admit(deliver, within, streamed=self._streamed)
            token_ids = await self._encoded()
            self._source = []
            if self.ended:  # meanwhile
                return
            self._start_timers(self._ticket, mailbox, number)
            self._worker.submit(self._ticket, token_ids, self.params)
        except BaseException:
            self.end()
            raise

    def take(self, message: Message | TimeoutError) -> TokenEvent | None:
        """The event that a message is.

        Returns:
            None for a message that says that the request is accepted, and for any after its end.

        Raises:
            TimeoutError: a deadline has passed.
            CaravanError: the request is refused, or a sample ended with an error.
        """
        if self.ended:
            return None
        if isinstance(message, TokenEvent):
            if message.error is not None:
                self.end()
                raise message.error
            if message.finish_reason is not None:
                self._num_going -= 1
                if not self._num_going:
                    self.end()
            return message
        if isinstance(message, Accepted):
            self.sequences = message.sequences
            self._num_going = len(message.sequences)
            return None
        self.end()
        raise message.with_traceback(None)  # several may be told the same error

    def end(self) -> None:
        """End it if it hasn't ended; a finalizer calls this, in any thread."""
        if self.ended:
            return
        self.ended = True
        if self._ticket is not None:
            self._worker.cancel(self._ticket)
        if not self._worker.forked:
            while self._timers:
                loop, timer = self._timers.pop()
                call_soon(loop, timer.cancel)

    def __del__(self) -> None:
        self.end()

    async def _encoded(self) -> list[int]:
        """The prompt's token ids, made off the loop where they are yet to be made."""
        if not callable(self._source):
            return self._source
        async with self._deadline.kept():
            return await asyncio.to_thread(self._source)

    def _start_timers(self, ticket: Ticket, mailbox: Mailbox, number: int) -> None:
        """Have the slot given back in time, also while nobody waits for an event."""
        loop = asyncio.get_running_loop()
        for deadline, expire in ((self._deadline, _expire), (self._turn, _give_up_waiting)):
            if deadline.left is not None:
                post = partial(mailbox.post, number)
                given = self._worker, ticket, post, deadline
                self._timers.append((loop, loop.call_later(deadline.left, expire, *given)))


Post = Callable[[TimeoutError], bool]


def _expire(worker: Worker, ticket: Ticket, post: Post, deadline: Deadline) -> None:
    worker.cancel(ticket)
    post(deadline.error())


def _give_up_waiting(worker: Worker, ticket: Ticket, post: Post, turn: Deadline) -> None:
    """End a request none of whose samples has had a slot."""
    if not ticket.ended and ticket.waiting >= max(1, len(ticket.sequences)):
        worker.cancel(ticket)
        message = f"the request has waited {turn.timeout} s for a slot, as long as it may"
        post(TimeoutError(f"{message}: try again later"))


def _seconds(timeout: object, param: str) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and timeout > 0:
        return timeout if timeout <= LONGEST_TIMEOUT else None
    raise RequestError(
        f"{param} must be None or a number of seconds above 0, not {timeout!r:.80}", param=param
    )
