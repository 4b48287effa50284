"""Several engines that look like one: a queue for all, and each on a device of its own.

Each holds the whole model, and a sequence stays where it got its slot. Where runners overlap, a
step is launched without waiting for it, so one thread keeps all the devices busy.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from statistics import fmean
from typing import Protocol, Unpack

from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError, CaravanError
from llama_runtime.events import Counters, TokenEvent
from llama_runtime.growth import late_error
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Origin, Sequence
from llama_runtime.waiting import WaitingQueue


class AnyEngine(Protocol):
    """What ``SharedEngine`` and ``Worker`` ask of an ``Engine`` or an ``EngineGroup``."""

    @property
    def failure(self) -> BackendError | None:
        """Why it has stopped, or None."""

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot yet."""

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""

    def counters(self) -> Counters:
        """A copy of the counters."""

    def add(
        self, prompt_token_ids: Seq[int], params: SamplingParams, **origin: Unpack[Origin]
    ) -> Sequence:
        """Queue a prompt."""

    def step(self) -> list[TokenEvent]:
        """Move what can be moved."""

    def abort(self, sequence_id: int) -> None:
        """End a sequence."""

    def check(self) -> None:
        """Raise if the bookkeeping doesn't balance."""

    def close(self) -> None:
        """End everything."""


class EngineGroup:
    """See ``Engine``, whose interface this is; what is said here is where they differ.

    Args:
        engines: of one bundle and one setting, with the same ``ids``; the group closes them.

    Attributes:
        max_len, closed: see ``Engine``.
    """

    def __init__(
        self, engines: Seq[Engine], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        lengths = {engine.max_len for engine in engines}
        if len(lengths) != 1:
            raise ValueError(f"a group takes engines of one max_len, not of {sorted(lengths)}")
        (self.max_len,), self.closed = lengths, False
        self._engines = list(engines)
        self._turns = list(engines)  # that work, by their last turn; the last to fail stays
        self._clock = clock
        self._waiting = WaitingQueue()
        self._sequences: dict[int, Sequence] = {}
        self._homes: dict[int, Engine] = {}
        self._num_late = 0  # of those that waited here
        self._events: list[TokenEvent] = []  # see ``Engine``

    @property
    def failure(self) -> BackendError | None:
        """Why nothing can run any more; None while one of the engines works."""
        return self._turns[0].failure

    @property
    def num_failed_steps(self) -> int:
        """Forwards that failed, of all the engines."""
        return sum(engine.num_failed_steps for engine in self._engines)

    @property
    def has_work(self) -> bool:
        """See ``Engine.has_work``."""
        untold = bool(self._waiting or self._events)
        return untold or any(engine.has_work for engine in self._turns)

    @property
    def num_waiting(self) -> int:
        """See ``Engine.num_waiting``."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """See ``Engine.num_running``."""
        return len(self._homes)

    @property
    def has_room(self) -> bool:
        """See ``Engine.has_room``."""
        return not self._waiting and any(engine.has_room for engine in self._turns)

    def run_apart(self, apart: bool = True) -> None:
        """See ``Engine.run_apart``."""
        for engine in self._engines:
            engine.run_apart(apart)

    @property
    def ready(self) -> bool:
        """See ``Engine.ready``."""
        # An engine without work gets what waits, before any other.
        working = [engine for engine in self._turns if engine.has_work or self._waiting]
        return not working or any(engine.ready for engine in working)

    def counters(self) -> Counters:
        """See ``Engine.counters``; those of all the engines together."""
        each = [engine.counters() for engine in self._engines]
        return Counters(
            reused_tokens=sum(one.reused_tokens for one in each),
            prefix_hits=sum(one.prefix_hits for one in each),
            drafted_tokens=sum(one.drafted_tokens for one in each),
            accepted_tokens=sum(one.accepted_tokens for one in each),
            late=self._num_late + sum(one.late for one in each),
            cache_use=fmean(one.cache_use for one in each),  # they are of one size
            batch_limit=sum(one.batch_limit for one in each),
            batch_decisions=tuple(decision for one in each for decision in one.batch_decisions),
        )

    def add(
        self, prompt_token_ids: Seq[int], params: SamplingParams, **origin: Unpack[Origin]
    ) -> Sequence:
        """See ``Engine.add``; it gets its slot, and so its engine, in the next step or later."""
        seq = self._turns[0].prepare(prompt_token_ids, params, **origin)
        if seq.id in self._sequences:
            raise ValueError("the engines of a group must share their ids")
        self._sequences[seq.id] = seq
        self._waiting.add(seq)
        return seq

    def step(self) -> list[TokenEvent]:
        """Give out free slots, have every engine launch, and collect where nobody has to wait.

        If one must be waited for, it is that whose step was collected longest ago; all have another
        one queued meanwhile. An engine that fails ends what runs on it, and the others go on with
        what waits; when the last has failed, that ends too.
        """
        self._end_late()
        self._give_slots()
        for engine in self._turns:
            engine.crowded = bool(self._waiting)
        working = [engine for engine in self._turns if engine.has_work]
        due = [engine for engine in working if engine.launch()]
        ready = [engine for engine in due if engine.ready]
        if not ready and len(due) == len(working):  # or else one has only begun
            ready = due[:1]
        for engine in ready:
            self._collect(engine)
        events, self._events = self._events, []
        return events

    def abort(self, sequence_id: int) -> None:
        """See ``Engine.abort``."""
        self._events = [event for event in self._events if event.sequence_id != sequence_id]
        seq = self._sequences.get(sequence_id)
        if seq is None:
            return
        home = self._homes.get(sequence_id)
        self._forget(seq)
        if home is not None:
            home.abort(sequence_id)
        else:
            seq.finish_reason = "abort"

    def check(self) -> None:
        """See ``Engine.check``; each sequence is in one place."""
        counts = Counter(id(engine) for engine in self._homes.values())
        for engine in self._engines:
            engine.check()
            held = engine.num_waiting + engine.num_running
            if held != counts[id(engine)]:
                raise RuntimeError(f"an engine holds {held} sequences, not {counts[id(engine)]}")
        both = {seq.id for seq in self._waiting} & self._homes.keys()
        if both or any(seq.finish_reason for seq in self._waiting):
            raise RuntimeError(f"sequences wait that run or ended: {sorted(both)}")
        if len(self._sequences) != len(self._waiting) + len(self._homes):
            raise RuntimeError(f"{len(self._sequences)} sequences neither wait nor run")
        if sum(self._waiting.held().values()) != len(self._homes):
            raise RuntimeError(f"callers hold {self._waiting.held()}, not {len(self._homes)} slots")

    def close(self) -> None:
        """See ``Engine.close``; where closing one engine fails, the others are closed too."""
        self.closed = True
        for sequence_id in list(self._sequences):
            self.abort(sequence_id)
        with ExitStack() as stack:
            for engine in self._engines:
                stack.callback(engine.close)

    def _give_slots(self) -> None:
        """Where the most is free, and in the order that they are due: none overtakes the first."""
        while (seq := self._waiting.first()) is not None:
            home = next((one for one in sorted(self._turns, key=_load) if one.start(seq)), None)
            if home is None:
                return
            self._waiting.grant(seq, self._clock())
            self._homes[seq.id] = home

    def _collect(self, engine: Engine) -> None:
        self._turns.remove(engine)
        self._turns.append(engine)
        for event in engine.collect():
            self._events.append(event)
            if event.finish_reason is not None:
                self._forget(self._sequences[event.sequence_id])
        if engine.failure is not None:
            if len(self._turns) == 1:
                self._end_waiting(engine.failure)
            else:
                self._turns.remove(engine)

    def _forget(self, seq: Sequence) -> None:
        """Let a sequence that ends neither wait nor run."""
        del self._sequences[seq.id]
        if self._homes.pop(seq.id, None) is not None:
            self._waiting.release(seq)
        else:
            self._waiting.remove(seq)

    def _end_late(self) -> None:
        for seq in self._waiting.late(self._clock()):
            self._num_late += 1
            self._end(seq, late_error(seq))

    def _end_waiting(self, error: BackendError) -> None:
        for seq in list(self._waiting):
            self._end(seq, error)

    def _end(self, seq: Sequence, error: CaravanError) -> None:
        """End a sequence that waits."""
        self._forget(seq)
        seq.finish_reason = "error"
        self._events.append(TokenEvent(seq.id, None, "", "error", error, sample=seq.sample))


def _load(engine: Engine) -> tuple[float, bool]:
    """What share of an engine's slots is taken, and whether a sequence would wait for its step."""
    return engine.num_running / engine.num_slots, not engine.ready
