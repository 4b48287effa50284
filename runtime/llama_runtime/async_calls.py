"""What calls on an event loop share: a deadline, and many requests at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from typing import Generic, TypeVar

from llama_runtime.admission import Accepted, Ticket
from llama_runtime.completion import Completion
from llama_runtime.errors import CaravanError, QueueFullError, RequestError
from llama_runtime.events import TokenEvent
from llama_runtime.mailbox import Mailbox, call_soon
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.worker import Worker

Item = TypeVar("Item")
# Token ids, or what makes them: a tokenizer or a template that would hold up the loop.
Source = list[int] | Callable[[], list[int]]
RETRY_SECONDS = 0.02  # between two attempts to go on with a call while others fill the queue
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


class Growing:
    """The completions of one request while they grow.

    Args:
        ticket: of the request.
    """

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self._sequences: dict[int, Sequence] = {}  # in the order of the samples
        self._texts: dict[int, list[str]] = {}
        self._completions: dict[int, Completion] = {}

    @property
    def done(self) -> bool:
        """Whether every sample has ended."""
        return 0 < len(self._sequences) == len(self._completions)

    @property
    def completions(self) -> list[Completion]:
        """Those of a request that is done, in the order of its samples."""
        return [self._completions[seq_id] for seq_id in self._sequences]

    def take(self, message: Accepted | TokenEvent) -> None:
        """Take a message about the request.

        Raises:
            CaravanError: a sample ended with an error.
        """
        if isinstance(message, Accepted):
            self._sequences = {seq.id: seq for seq in message.sequences}
            self._texts = {seq.id: [] for seq in message.sequences}
            return
        if message.error is not None:
            raise message.error
        seq, texts = self._sequences[message.sequence_id], self._texts[message.sequence_id]
        texts.append(message.text)
        if message.finish_reason is not None:
            self._completions[seq.id] = Completion.of(seq, "".join(texts), message)


class Call(Generic[Item]):
    """Many requests as one, a window of them at a time.

    Args:
        worker: runs them.
        items: prompts or conversations.
        source: makes a prompt of one of them and its parameters.
        params: of each.
        window: the most that are in flight at once.
    """

    def __init__(
        self,
        worker: Worker,
        items: Seq[Item],
        source: Callable[[Item, SamplingParams], Source],
        params: Seq[SamplingParams],
        window: int,
    ) -> None:
        self._worker = worker
        self._items = items
        self._source = source
        self._params = params
        self._window = window
        self._mailbox = Mailbox()
        self._growing: dict[int, Growing] = {}
        self._done: dict[int, list[Completion]] = {}
        self._begun = 0
        self._concerns = 0  # the item that is looked at

    async def run(self) -> list[Completion]:
        """Run all of them.

        Returns:
            The completions of all samples, in order.

        Raises:
            QueueFullError: there is no room for the first; the others wait for theirs.
            CaravanError: one of them failed, and which one is noted; the others were given up.
        """
        admission = self._worker.admission
        whole = self._worker.hold(partial(self._mailbox.post, -1))
        try:
            while len(self._done) < len(self._items):
                await self._begin_some(whole)
                await self._take_one()
        except CaravanError as error:
            if error is not admission.failure and not admission.closed:  # nobody's fault
                error.add_note(f"prompt {self._concerns} of {len(self._items)}")
            raise
        finally:
            for one in self._growing.values():
                self._worker.cancel(one.ticket)
            self._worker.cancel(whole)
        return [completion for i in range(len(self._items)) for completion in self._done[i]]

    async def _begin_some(self, whole: Ticket) -> None:
        """Begin as many as there is room for, and one at least."""
        while self._begun < len(self._items) and len(self._growing) < self._window:
            index = self._concerns = self._begun
            try:
                self._growing[index] = Growing(await self._begin(index, whole))
                self._begun += 1
            except QueueFullError:
                if self._growing:
                    return  # to try again after their next message
                if self._begun == 0:
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    async def _begin(self, index: int, whole: Ticket) -> Ticket:
        ticket = self._worker.admit(partial(self._mailbox.post, index), whole)
        try:
            params = self._params[index]
            token_ids = await encoded(self._source(self._items[index], params))
            self._worker.submit(ticket, token_ids, params)
        except BaseException:
            self._worker.cancel(ticket)
            raise
        return ticket

    async def _take_one(self) -> None:
        """Wait for a message about one of them."""
        index, message = await self._mailbox.get()
        if isinstance(message, (CaravanError, TimeoutError)):
            if index >= 0:
                self._concerns = index
            raise message.with_traceback(None)  # others may be told the same error
        self._concerns = index
        self._growing[index].take(message)
        if self._growing[index].done:
            self._done[index] = self._growing.pop(index).completions


async def encoded(source: Source) -> list[int]:
    """The token ids of a prompt, made off the loop where they are yet to be made."""
    return await asyncio.to_thread(source) if callable(source) else source


async def settled(future: Future[None], timeout: float | None) -> bool:
    """Wait for another thread's word; False if it hasn't come in time."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()
    future.add_done_callback(lambda _: call_soon(loop, event.set))
    try:
        async with asyncio.timeout(timeout):
            await event.wait()
    except TimeoutError:
        return future.done()
    return True


def _seconds(timeout: object, param: str) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, (int, float)) and not isinstance(timeout, bool) and timeout > 0:
        return timeout if timeout <= LONGEST_TIMEOUT else None
    raise RequestError(
        f"{param} must be None or a number of seconds above 0, not {timeout!r:.80}", param=param
    )
