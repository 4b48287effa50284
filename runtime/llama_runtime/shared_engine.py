"""One engine for several threads: calls that overlap share the batch.

There is no thread of its own. Whoever waits for tokens runs the next step for everybody and
leaves the others' events in their inboxes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

from llama_runtime.engine_group import AnyEngine
from llama_runtime.errors import CaravanError, RequestError
from llama_runtime.events import Counters, TokenEvent
from llama_runtime.params import SamplingParams, fresh_seed
from llama_runtime.sequence import Sequence


class Inbox(deque[TokenEvent]):
    """Events of some sequences.

    Attributes:
        num_open: how many of the sequences may still have one.
    """

    num_open = 0


@dataclass(slots=True)
class Stats(Counters):
    """Counters since the start, and what goes on now; ``Counters`` has the engine's own.

    Attributes:
        prompt_tokens: tokens of the prompts that were accepted.
        completion_tokens: tokens generated.
        finished: sequences that ended, for whatever reason.
        running: sequences that hold a slot.
        waiting: sequences that wait for one.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    running: int = 0
    waiting: int = 0

    def learn(self, counters: Counters) -> None:
        """Take over what an engine has counted."""
        for counted in fields(counters):
            setattr(self, counted.name, getattr(counters, counted.name))


class SharedEngine:
    """Adds, steps and aborts under one lock, and sorts events by who waits for them.

    Args:
        engine: used by nobody else from now on.
    """

    def __init__(self, engine: AnyEngine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # held while waiting for the lock, so that turns alternate
        self._inboxes: dict[int, Inbox] = {}
        self._dropped: deque[Sequence] = deque()
        self._stats = Stats()
        self._pid = os.getpid()
        self.closed = False

    @property
    def failed(self) -> bool:
        """Whether the backend has failed, so that nothing can run any more."""
        return self._engine.failure is not None

    def add(
        self,
        prompt_token_ids: Seq[int],
        params: SamplingParams,
        inbox: Inbox,
        *,
        streamed: bool = False,
    ) -> list[Sequence]:
        """Queue the ``n`` sequences of a prompt, whose events go to ``inbox``; see ``Engine.add``.

        Those that share an inbox are of one caller, unless ``params`` name another.

        Raises:
            CaravanError: this was closed, or the process is a fork of the one that loaded it.
        """
        self._check_usable()
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"params must be SamplingParams, not {type(params).__name__}", param="params"
            )
        seed = fresh_seed()  # one for all of them
        with self._next():
            self._abort_dropped()
            seqs = [
                self._engine.add(
                    prompt_token_ids,
                    params,
                    sample=sample,
                    seed=seed,
                    caller=id(inbox),
                    streamed=streamed,
                )
                for sample in range(params.n)
            ]
            for seq in seqs:
                self._inboxes[seq.id] = inbox
                inbox.num_open += 1
                self._stats.prompt_tokens += seq.num_prompt_tokens
            return seqs

    def wait(self, inbox: Inbox) -> None:
        """Step until there is an event in ``inbox``, or none can come any more.

        That is so when all its sequences have been dropped, by a thread that doesn't wait for it.
        """
        while not inbox and inbox.num_open:
            self._check_usable()
            with self._next():
                if not inbox and not self.closed:
                    self._step()

    def drop(self, seq: Sequence) -> None:
        """Abort a sequence that nobody waits for any more; one that ended is left alone.

        It never waits: a stream may be collected as garbage in the middle of a step, by the very
        thread that runs it. If the engine is busy, the slot is free before the next step.
        """
        self._dropped.append(seq)
        if self._lock.acquire(blocking=False):
            try:
                self._abort_dropped()
            finally:
                self._lock.release()

    def stats(self) -> Stats:
        """A copy of the counters.

        Raises:
            CaravanError: the process is a fork of the one that loaded this.
        """
        self._check_process()
        with self._lock:
            self._abort_dropped()
            self._stats.learn(self._engine.counters())
            running, waiting = self._engine.num_running, self._engine.num_waiting
            return replace(self._stats, running=running, waiting=waiting)

    def close(self) -> None:
        """Abort what is in flight and close the engine; a second call does nothing.

        Nor does it in a fork, where the kernels' threads and maybe the lock's holder are missing.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if not self.closed:
                self.closed = True
                self._inboxes.clear()
                self._engine.close()

    @contextmanager
    def _next(self) -> Iterator[None]:
        """The lock, in turns: alone it would go to the thread that has just released it."""
        with self._turn:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _abort_dropped(self) -> None:
        while self._dropped:
            seq = self._dropped.popleft()
            inbox = self._inboxes.pop(seq.id, None)
            if inbox is not None:
                inbox.num_open -= 1
                self._engine.abort(seq.id)
                self._stats.finished += 1

    def _step(self) -> None:
        self._abort_dropped()
        for event in self._engine.step():
            self._inboxes[event.sequence_id].append(event)
            if event.token_id is not None:
                self._stats.completion_tokens += 1
            if event.finish_reason is not None:
                self._inboxes.pop(event.sequence_id).num_open -= 1
                self._stats.finished += 1

    def _check_usable(self) -> None:
        if self.closed:
            raise CaravanError("the LLM is closed")
        self._check_process()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise CaravanError("an LLM can't be used after fork: load it in the child process")
