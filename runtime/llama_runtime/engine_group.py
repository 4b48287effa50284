"""Several engines that look like one: a queue for all, and each on a device of its own.

Each holds the whole model, and a sequence stays where it got its slot. Where runners overlap, a
step is launched without waiting for it, so one thread keeps all the devices busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from typing import Protocol

from llama_runtime.engine import Engine, TokenEvent
from llama_runtime.errors import BackendError
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence


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
        """Sequences without a slot yet, which get one in order of arrival."""

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""

    def add(
        self, prompt_token_ids: Seq[int], params: SamplingParams, *, sample: int = 0
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

    def __init__(self, engines: Seq[Engine]) -> None:
        lengths = {engine.max_len for engine in engines}
        if len(lengths) != 1:
            raise ValueError(f"a group takes engines of one max_len, not of {sorted(lengths)}")
        (self.max_len,), self.closed = lengths, False
        self._engines = list(engines)
        self._turns = list(engines)  # that work, by their last turn; the last to fail stays
        self._waiting: dict[int, Sequence] = {}  # in order of arrival
        self._homes: dict[int, Engine] = {}
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

    @property
    def ready(self) -> bool:
        """See ``Engine.ready``."""
        # An engine without work gets what waits, before any other.
        working = [engine for engine in self._turns if engine.has_work or self._waiting]
        return not working or any(engine.ready for engine in working)

    def add(
        self, prompt_token_ids: Seq[int], params: SamplingParams, *, sample: int = 0
    ) -> Sequence:
        """See ``Engine.add``; it gets its slot, and so its engine, in the next step or later."""
        seq = self._turns[0].prepare(prompt_token_ids, params, sample=sample)
        if seq.id in self._waiting or seq.id in self._homes:
            raise ValueError("the engines of a group must share their ids")
        self._waiting[seq.id] = seq
        return seq

    def step(self) -> list[TokenEvent]:
        """Give out free slots, have every engine launch, and collect where nobody has to wait.

        If one must be waited for, it is that whose step was collected longest ago; all have another
        one queued meanwhile. An engine that fails ends what runs on it, and the others go on with
        what waits; when the last has failed, that ends too.
        """
        self._give_slots()
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
        seq, home = self._waiting.pop(sequence_id, None), self._homes.pop(sequence_id, None)
        if seq is not None:
            seq.finish_reason = "abort"
        if home is not None:
            home.abort(sequence_id)

    def check(self) -> None:
        """See ``Engine.check``; each sequence is in one place."""
        counts = Counter(id(engine) for engine in self._homes.values())
        for engine in self._engines:
            engine.check()
            held = engine.num_waiting + engine.num_running
            if held != counts[id(engine)]:
                raise RuntimeError(f"an engine holds {held} sequences, not {counts[id(engine)]}")
        both = self._waiting.keys() & self._homes.keys()
        if both or any(seq.finish_reason for seq in self._waiting.values()):
            raise RuntimeError(f"sequences wait that run or ended: {sorted(both)}")

    def close(self) -> None:
        """See ``Engine.close``; where closing one engine fails, the others are closed too."""
        self.closed = True
        for sequence_id in [*self._waiting, *self._homes]:
            self.abort(sequence_id)
        with ExitStack() as stack:
            for engine in self._engines:
                stack.callback(engine.close)

    def _give_slots(self) -> None:
        """In order of arrival, and where the most is free: none overtakes the first that waits."""
        while self._waiting:
            seq = next(iter(self._waiting.values()))
            home = next((one for one in sorted(self._turns, key=_load) if one.start(seq)), None)
            if home is None:
                return
            del self._waiting[seq.id]
            self._homes[seq.id] = home

    def _collect(self, engine: Engine) -> None:
        self._turns.remove(engine)
        self._turns.append(engine)
        for event in engine.collect():
            self._events.append(event)
            if event.finish_reason is not None:
                del self._homes[event.sequence_id]
        if engine.failure is not None:
            if len(self._turns) == 1:
                self._end_waiting(engine.failure)
            else:
                self._turns.remove(engine)

    def _end_waiting(self, error: BackendError) -> None:
        while self._waiting:
            seq = self._waiting.pop(next(iter(self._waiting)))
            seq.finish_reason = "error"
            self._events.append(TokenEvent(seq.id, None, "", "error", error, sample=seq.sample))


def _load(engine: Engine) -> tuple[float, bool]:
    """What share of an engine's slots is taken, and whether a sequence would wait for its step."""
    return engine.num_running / engine.num_slots, not engine.ready
