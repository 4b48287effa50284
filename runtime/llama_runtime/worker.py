"""One thread that owns an engine and steps it, for callers that must not wait for a step.

Callers leave commands in a queue and go on. The thread runs steps while there is work, sleeps
otherwise, and hands messages out by a callback for each request.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from functools import partial
from itertools import islice
from queue import SimpleQueue

from llama_runtime.admission import Accepted, Admission, Deliver, Message, Ticket, settle
from llama_runtime.engine_group import AnyEngine
from llama_runtime.errors import BackendError, CaravanError, RequestError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams, fresh_seed
from llama_runtime.sequence import Sequence
from llama_runtime.shared_engine import Stats

logger = logging.getLogger(__name__)

EXIT_SECONDS = 10.0  # how long the end of the program waits for a step


class Worker:
    """Runs an engine in a thread of its own. Any thread may call, and only ``join`` waits.

    Commands go through a ``SimpleQueue``, whose ``put`` is made for finalizers: a stream may be
    collected as garbage at any line of any thread, this one's included, and has to say so. For the
    same reason ``cancel`` and ``stop`` take no lock.

    Args:
        engine: used by nobody else from now on; the worker closes it.
        max_queued_requests: so many requests may wait for a slot.
        max_queued_tokens: with so many prompt tokens waiting, no more requests are taken.

    Attributes:
        admission: what is in flight; its flags may be read.
        ended: done when the thread has closed the engine and ends.
    """

    def __init__(
        self, engine: AnyEngine, *, max_queued_requests: int, max_queued_tokens: int
    ) -> None:
        self.admission = Admission(max_queued_requests, max_queued_tokens)
        self.ended: Future[None] = Future()
        self._engine = engine
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._owners: dict[int, Ticket] = {}  # by sequence; this and the next two: the thread's own
        self._without_slot: dict[int, Sequence] = {}
        self._stopping = False
        self._turn_began: float | None = None  # None while the thread sleeps
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="caravan-worker", daemon=True)
        _running.add(self)
        try:
            self._thread.start()
        except BaseException:
            _running.discard(self)
            raise

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that has the thread."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Refuse use in a fork, where the thread is missing and a lock may be held for ever.

        Raises:
            CaravanError: this is one.
        """
        if self.forked:
            raise CaravanError("an LLM can't be used after fork: load it in the child process")

    def hold(self, deliver: Deliver) -> Ticket:
        """Begin a call of several requests, so that draining waits for those not admitted yet.

        Args:
            deliver: told if nothing can run any more.

        Returns:
            A ticket that waits for no slot; ``cancel`` ends the call.

        Raises:
            BackendError: an earlier step failed.
            CaravanError: this drains or is closed, or the process is a fork.
        """
        self.check_process()
        return self.admission.open(deliver, None, waits=False)

    def admit(
        self, deliver: Deliver, within: Ticket | None = None, *, streamed: bool = False
    ) -> Ticket:
        """Give a request its place in the queue, before its prompt becomes tokens.

        Args:
            deliver: takes its messages, mostly on the worker's thread.
            within: the call that it belongs to, which goes on while this drains. Its requests are
                of one caller, unless their parameters name another.
            streamed: whether somebody reads its tokens as they come.

        Returns:
            What ``submit`` takes; ``cancel`` gives the place back.

        Raises:
            QueueFullError: as much waits as may.
            BackendError: an earlier step failed.
            CaravanError: this drains or is closed, or the process is a fork.
        """
        self.check_process()
        return self.admission.open(deliver, within, waits=True, streamed=streamed)

    def submit(self, ticket: Ticket, token_ids: Seq[int], params: SamplingParams) -> None:
        """Say what an admitted request is. What the engine has against it comes as a message.

        Raises:
            QueueFullError: as many prompt tokens wait as may; the ticket is still to be cancelled.
            CaravanError: the process is a fork.
        """
        self.check_process()
        if self.admission.place(ticket, _samples(params), len(token_ids)):
            self._commands.put(partial(self._add, ticket, token_ids, params))

    def cancel(self, ticket: Ticket) -> None:
        """End a request before the next step, wherever it is; one that ended is left alone."""
        if not ticket.ended and not self.forked:
            self._commands.put(partial(self._cancel, ticket))

    def stats(self) -> Stats:
        """A copy of the counters, as the last step left them.

        Raises:
            CaravanError: the process is a fork.
        """
        self.check_process()
        return self.admission.stats()

    @property
    def busy_seconds(self) -> float:
        """How long the thread has been at its turn, a step and what comes with it; 0 if it sleeps.

        It waits for nothing, so that it tells of a step that hangs.
        """
        began = self._turn_began
        return 0.0 if began is None else time.monotonic() - began

    def drain(self) -> None:
        """Take no new requests; ``admission.drained`` is done when those in flight have ended.

        Raises:
            CaravanError: the process is a fork.
        """
        self.check_process()
        self.admission.drain()

    def close(self) -> None:
        """End every request with an error, and the thread after its step; nothing in a fork."""
        if not self.forked:
            self.admission.close()
            self.stop()

    def stop(self) -> None:
        """Have the thread close this."""
        self._commands.put(self._stop)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout)

    # --- on the worker's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                try:
                    self._turn()
                except BaseException as error:
                    self._fail(error)
                self._turn_began = None
            self._engine.close()
        except Exception:
            logger.exception("the engine could not be closed")
        finally:
            self.admission.close()
            self.admission.count(running=0)
            self._owners.clear()
            self._without_slot.clear()
            settle(self.ended)
            _running.discard(self)

    def _turn(self) -> None:
        """The commands that are there, then a step; sleeps until there is something to do."""
        failed = self.admission.failure is not None
        sleeps = failed or not self._engine.has_work
        first = self._commands.get() if sleeps else None
        self._turn_began = time.monotonic()
        if first is not None:
            first()
        for _ in range(self._commands.qsize()):  # and not those that come meanwhile, for ever
            self._commands.get()()
        if self._engine.has_work and not failed and not self._stopping:
            self._step()

    def _stop(self) -> None:
        self.admission.close()
        self._stopping = True

    def _fail(self, error: BaseException) -> None:
        """Tell everybody of an error that nobody expected, and never step again."""
        logger.error("the worker failed", exc_info=error)
        failure = BackendError(f"the worker failed: {error!r}")
        failure.__cause__ = error
        self._owners.clear()
        self._without_slot.clear()
        self.admission.fail(failure)

    def _add(self, ticket: Ticket, token_ids: Seq[int], params: SamplingParams) -> None:
        if ticket.ended:
            return
        added: list[Sequence] = []
        try:
            self._add_samples(added, ticket, token_ids, params)
        except CaravanError as error:
            for seq in added:
                self._engine.abort(seq.id)
            self.admission.end(ticket, error)
            return
        ticket.sequences = tuple(added)
        self._owners.update((seq.id, ticket) for seq in added)
        self._without_slot.update((seq.id, seq) for seq in added)
        self.admission.count(
            running=self._engine.num_running,
            prompt_tokens=sum(seq.num_prompt_tokens for seq in added),
        )
        self._tell(ticket, Accepted(ticket.sequences))

    def _add_samples(
        self,
        added: list[Sequence],
        ticket: Ticket,
        token_ids: Seq[int],
        params: SamplingParams,
    ) -> None:
        """Samples of one request share a seed, and differ in their index."""
        seed = fresh_seed()
        try:
            for sample in range(_samples(params)):
                seq = self._engine.add(
                    token_ids,
                    params,
                    sample=sample,
                    seed=seed,
                    caller=id(ticket.caller or ticket),
                    streamed=ticket.streamed,
                )
                added.append(seq)
        except CaravanError:
            raise
        except Exception as error:  # what one request holds must not harm the others
            raise RequestError(f"the request can't be read: {error!r}", param="prompt") from error

    def _cancel(self, ticket: Ticket) -> None:
        aborted = [seq for seq in ticket.sequences if self._owners.pop(seq.id, None) is not None]
        for seq in aborted:
            self._without_slot.pop(seq.id, None)
            self._engine.abort(seq.id)
        self.admission.count(running=self._engine.num_running, finished=len(aborted))
        self.admission.end(ticket)

    def _step(self) -> None:
        events = self._engine.step()
        self._count(events)
        failure = self._engine.failure
        for event in events:
            if failure is not None and event.error is failure:
                continue
            ticket = self._owners[event.sequence_id]
            self._tell(ticket, event)
            if event.finish_reason is not None:
                del self._owners[event.sequence_id]
                if not any(seq.id in self._owners for seq in ticket.sequences):
                    self.admission.end(ticket)
        if failure is not None:
            self._owners.clear()
            self.admission.fail(failure)

    def _count(self, events: Seq[TokenEvent]) -> None:
        """Bring the counters up to date, before anybody hears of the step."""
        num_started = len(self._without_slot) - self._engine.num_waiting
        had_one = (
            seq for seq in self._without_slot.values() if seq.slot is not None or seq.finish_reason
        )
        started = list(islice(had_one, num_started))  # mostly those that came first
        for seq in started:
            del self._without_slot[seq.id]
        self.admission.count(
            running=self._engine.num_running,
            counters=self._engine.counters(),
            started=[self._owners[seq.id] for seq in started],
            completion_tokens=sum(event.token_id is not None for event in events),
            finished=sum(event.finish_reason is not None for event in events),
        )

    def _tell(self, ticket: Ticket, message: Message) -> None:
        if not ticket.ended and not ticket.tell(message):
            self.cancel(ticket)


def _samples(params: object) -> int:
    return params.n if isinstance(params, SamplingParams) else 1  # which the engine refuses


def _end_all() -> None:
    """Let no native code run while Python is taken down."""
    workers, deadline = list(_running), time.monotonic() + EXIT_SECONDS
    for worker in workers:
        worker.close()
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))


_running: set[Worker] = set()
atexit.register(_end_all)
