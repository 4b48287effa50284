"""Who may come in, what waits for a slot, and what is in flight, for callers of several threads.

Nothing here runs a step or waits for one: the lock is held for a few lines of bookkeeping.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace

from llama_runtime.errors import BackendError, CaravanError, QueueFullError
from llama_runtime.events import Counters, TokenEvent
from llama_runtime.sequence import Sequence
from llama_runtime.shared_engine import Stats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The engine took a request.

    Attributes:
        sequences: one for each sample, in order. They grow until the last event of each.
    """

    sequences: tuple[Sequence, ...]


Message = Accepted | TokenEvent | CaravanError
# Must neither wait nor take long; False says that nobody listens any more.
Deliver = Callable[[Message], bool]


@dataclass(slots=True, eq=False)
class Ticket:
    """One request from its admission to its end; callers only hand it back.

    Attributes:
        deliver: takes its messages: ``Accepted``, then its events, or an error in place of any.
        ended: whether nothing follows any more.
        sequences: what it runs.
        waiting: how many of its sequences have no slot yet.
        num_tokens: prompt tokens of each.
        caller: the call that it belongs to; its own self if it is one.
        streamed: whether somebody reads its tokens as they come.
    """

    deliver: Deliver
    ended: bool = False
    sequences: tuple[Sequence, ...] = ()
    waiting: int = 0
    num_tokens: int = 0
    caller: Ticket | None = None
    streamed: bool = False

    def tell(self, message: Message) -> bool:
        """Deliver a message; False if nobody listens."""
        try:
            return self.deliver(message)
        except Exception:
            logger.exception("a request is cancelled, because its callback failed")
            return False


class Admission:
    """Lets requests in, up to a bound on those that wait, and knows every one in flight.

    Args:
        max_requests: so many requests may wait for a slot.
        max_tokens: with so many prompt tokens waiting, no more requests are taken.

    Attributes:
        failure: why nothing can run any more, or None.
        draining: whether new requests are refused.
        closed: whether everything is.
        drained: done when this drains and nothing is in flight any more.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.failure: BackendError | None = None
        self.draining = self.closed = False
        self.drained: Future[None] = Future()
        self._max_requests, self._max_tokens = max_requests, max_tokens
        self._lock = threading.Lock()
        self._tickets: set[Ticket] = set()
        self._requests = self._tokens = 0  # what waits
        self._stats = Stats()

    def open(
        self, deliver: Deliver, within: Ticket | None, *, waits: bool, streamed: bool = False
    ) -> Ticket:
        """A ticket for one request more; see ``Worker.admit`` and ``Worker.hold``."""
        with self._lock:
            self._check_open(within)
            if waits:
                self._check_room(self._requests)
            ticket = Ticket(deliver, caller=within, streamed=streamed)
            self._change(ticket, int(waits), 0)
            self._tickets.add(ticket)
        return ticket

    def check(self, requests: int, tokens: int) -> None:
        """Raise what a request would be refused with if so much more waited; see ``open``."""
        with self._lock:
            self._check_open(None)
            self._check_room(self._requests + requests, tokens)

    def place(self, ticket: Ticket, num_sequences: int, num_tokens: int) -> bool:
        """Count what a request that came in really is.

        Returns:
            False if it has ended meanwhile.

        Raises:
            QueueFullError: as many prompt tokens wait as may.
        """
        with self._lock:
            if ticket.ended:
                return False
            self._check_room(self._requests - 1)
            self._change(ticket, num_sequences, num_tokens)
        return True

    def end(self, ticket: Ticket, last: CaravanError | None = None) -> None:
        """Let nothing follow for a ticket but ``last``; nothing does if it has ended already."""
        with self._lock:
            if ticket.ended:
                return
            ticket.ended = True
            self._tickets.remove(ticket)
            self._change(ticket, 0, 0)
            drained = self.draining and not self._tickets
        if last is not None:
            ticket.tell(last)
        if drained:
            settle(self.drained)

    def drain(self) -> None:
        """Take no new requests."""
        with self._lock:
            self.draining = True
            drained = not self._tickets
        if drained:
            settle(self.drained)

    def close(self) -> None:
        """Take no requests, and end those in flight."""
        with self._lock:
            self.closed = True
            tickets = list(self._tickets)
        for ticket in tickets:
            self.end(ticket, closed())

    def fail(self, failure: BackendError) -> None:
        """Take no requests, and end those in flight with the same error."""
        with self._lock:
            self.failure = self.failure or failure
            self._stats.running, self._stats.cache_use = 0, 0.0
            tickets = list(self._tickets)
        for ticket in tickets:
            self.end(ticket, self.failure)

    def count(
        self,
        *,
        running: int,
        counters: Counters | None = None,
        started: list[Ticket] | None = None,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        finished: int = 0,
    ) -> None:
        """Count what happened.

        Args:
            running: sequences that hold a slot now.
            counters: the engine's own, if they may have changed.
            started: for each sequence that waits no longer, its ticket.
            prompt_tokens: of prompts that were accepted.
            completion_tokens: that were generated.
            finished: sequences that ended.
        """
        with self._lock:
            for ticket in started or ():
                if not ticket.ended:
                    self._change(ticket, ticket.waiting - 1, ticket.num_tokens)
            self._stats.running = 0 if self.failure is not None else running
            if counters is not None:
                self._stats.learn(counters)
            self._stats.prompt_tokens += prompt_tokens
            self._stats.completion_tokens += completion_tokens
            self._stats.finished += finished
            if not self._stats.running:  # the engine's word for it may come with the next step only
                self._stats.cache_use = 0.0

    def stats(self) -> Stats:
        """A copy of the counters."""
        with self._lock:
            return replace(self._stats)

    def _check_open(self, within: Ticket | None) -> None:
        if self.closed:
            raise closed()
        if self.failure is not None:
            raise BackendError(f"the engine has stopped: {self.failure}") from self.failure
        if self.draining and within is None:
            raise CaravanError("the LLM is draining: it takes no new requests")

    def _check_room(self, requests: int, more_tokens: int = 0) -> None:
        tokens = self._tokens + more_tokens
        if requests >= self._max_requests or tokens >= self._max_tokens:
            raise QueueFullError(
                f"{requests:,} requests with {tokens:,} prompt tokens wait for a slot, of at "
                f"most {self._max_requests:,} and {self._max_tokens:,}: try again later, or raise "
                "max_queued_requests or max_queued_tokens"
            )

    def _change(self, ticket: Ticket, waiting: int, num_tokens: int) -> None:
        """Say how many sequences of a ticket wait, and how long the prompt of each is."""
        self._requests += (waiting > 0) - (ticket.waiting > 0)
        self._tokens += waiting * num_tokens - ticket.waiting * ticket.num_tokens
        self._stats.waiting += waiting - ticket.waiting
        ticket.waiting, ticket.num_tokens = waiting, num_tokens


def closed() -> CaravanError:
    """What everybody is told who still wants something; a new one each, for its traceback."""
    return CaravanError("the LLM is closed")


def settle(future: Future[None]) -> None:
    """Say that something has come to pass, also where another thread says it."""
    with suppress(InvalidStateError):
        future.set_result(None)
