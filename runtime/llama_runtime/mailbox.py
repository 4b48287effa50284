"""How other threads, the worker's above all, tell an event loop what happened."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

from llama_runtime.admission import Message

Letter = tuple[int, Message | TimeoutError]  # the request that it is about, and what is said of it


class Mailbox:
    """Messages about some requests, put there by other threads and read on the loop that made it.

    It doesn't know who reads it, so the worker keeps no stream from being collected as garbage.
    """

    def __init__(self) -> None:
        self._delivery = Delivery.here()
        self._letters: deque[Letter] = deque()  # only the loop's thread touches it
        self._stirred = asyncio.Event()

    def take(self) -> Letter | None:
        """The next letter, if one is there."""
        return self._letters.popleft() if self._letters else None

    async def wait(self) -> None:
        """Until a letter is there, or ``stir`` is called."""
        if not self._letters:
            self._stirred.clear()
            await self._stirred.wait()

    def stir(self) -> None:
        """End the waiting, on the loop, with or without a letter."""
        self._stirred.set()

    def post(self, request: int, message: Message | TimeoutError) -> bool:
        """Leave a message about a request, in any thread; False if the loop is closed."""
        return self._delivery.put(self, (request, message))

    def drop(self, letter: Letter) -> None:
        """Leave a letter, on the loop."""
        self._letters.append(letter)
        self._stirred.set()


class Delivery:
    """Takes letters of other threads to the mailboxes of a loop, many with one waking of the loop.

    A step has an event for each slot. To wake the loop for each would cost a system call each, in
    which the thread that steps loses the interpreter to the loop, and waits for it to come back.

    Args:
        loop: that reads the mailboxes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # which ends when its last task does
        self._bag: deque[tuple[Mailbox, Letter]] = deque()
        self._is_due = False  # the loop will come for the bag, and hasn't begun to empty it

    @staticmethod
    def here() -> Delivery:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        with _deliveries_lock:
            return _deliveries.setdefault(loop, Delivery(loop))

    def put(self, mailbox: Mailbox, letter: Letter) -> bool:
        """Take a letter to a mailbox, in any thread; False if the loop is closed."""
        loop = self._loop()
        if loop is None or loop.is_closed():
            return False
        self._bag.append((mailbox, letter))
        if self._is_due:
            return True
        self._is_due = True
        return call_soon(loop, self._empty)

    def _empty(self) -> None:
        self._is_due = False  # first: what comes from now on has the loop come again
        while self._bag:
            mailbox, letter = self._bag.popleft()
            mailbox.drop(letter)


# Loops come and go, in any thread.
_deliveries: WeakKeyDictionary[asyncio.AbstractEventLoop, Delivery] = WeakKeyDictionary()
_deliveries_lock = threading.Lock()


def call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> bool:
    """Have a loop of any thread call something; False if it is closed."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise
        return False
    return True
