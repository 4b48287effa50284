"""Many requests of an event loop as one call."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

from llama_runtime.admission import Message, Ticket
from llama_runtime.async_request import AsyncRequest, Source
from llama_runtime.completion import Completion
from llama_runtime.errors import CaravanError, QueueFullError
from llama_runtime.mailbox import Mailbox, call_soon
from llama_runtime.params import SamplingParams
from llama_runtime.worker import Worker

Item = TypeVar("Item")
RETRY_SECONDS = 0.02  # between two attempts to go on with a call while others fill the queue


class Growing:
    """The completions of one request while they grow.

    Args:
        request: whose they are.
    """

    def __init__(self, request: AsyncRequest) -> None:
        self.request = request
        self._texts: defaultdict[int, list[str]] = defaultdict(list)  # by sequence
        self._completions: dict[int, Completion] = {}

    @property
    def completions(self) -> list[Completion]:
        """Those of a request that has ended, in the order of its samples."""
        return [self._completions[seq.id] for seq in self.request.sequences]

    def take(self, message: Message | TimeoutError) -> None:
        """Take a message about the request.

        Raises:
            CaravanError: it was refused, or a sample ended with an error.
        """
        event = self.request.take(message)
        if event is None:
            return
        texts = self._texts[event.sequence_id]
        texts.append(event.text)
        if event.finish_reason is not None:
            seq = next(seq for seq in self.request.sequences if seq.id == event.sequence_id)
            self._completions[seq.id] = Completion.of(seq, "".join(texts), event)


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
                await self._take_some()
        except CaravanError as error:
            if error is not admission.failure and not admission.closed:  # nobody's fault
                error.add_note(f"prompt {self._concerns} of {len(self._items)}")
            raise
        finally:
            for one in self._growing.values():
                one.request.end()
            self._worker.cancel(whole)
        return [completion for i in range(len(self._items)) for completion in self._done[i]]

    async def _begin_some(self, whole: Ticket) -> None:
        """Begin as many as there is room for, and one at least."""
        while self._begun < len(self._items) and len(self._growing) < self._window:
            index = self._concerns = self._begun
            try:
                params = self._params[index]
                request = AsyncRequest(
                    self._worker, self._source(self._items[index], params), params
                )
                await request.begin(self._mailbox, index, whole)
                self._growing[index] = Growing(request)
                self._begun += 1
            except QueueFullError:
                if self._growing:
                    return  # to try again after their next message
                if self._begun == 0:
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    async def _take_some(self) -> None:
        """Take what there is to hear of them; waits until there is something."""
        await self._mailbox.wait()
        while (letter := self._mailbox.take()) is not None:
            index, message = letter
            if index < 0:  # nothing can run any more
                assert isinstance(message, CaravanError)
                raise message.with_traceback(None)  # others are told the same error
            if (growing := self._growing.get(index)) is None:
                continue  # the LLM was closed just as it ended
            self._concerns = index
            growing.take(message)
            if growing.request.ended:
                self._done[index] = self._growing.pop(index).completions


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
