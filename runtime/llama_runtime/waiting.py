"""Who gets the next free slot: priorities that age, deadlines, and even shares for all callers."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import count
from math import inf

from llama_runtime.sequence import Sequence

AGEING = 10.0  # seconds of waiting that make up for one level of priority, or for one slot held


class WaitingQueue:
    """Sequences that wait for a slot, and how many slots each caller holds.

    The first is the one that is due first. A sequence is due at its arrival, or when its caller was
    given a slot for the last time if that was later, plus ``AGEING`` seconds for each level of its
    priority; or at its deadline if that comes sooner. Each slot that its caller holds puts it off
    by as much again.

    So callers who all have something waiting get slots in turn, whatever the length of their
    queues; and nobody starves, because for one who waits none of this moves, while those who come
    later are due later and later.
    """

    def __init__(self) -> None:
        self._waiting: dict[Sequence, int] = {}  # in order of arrival, which decides between equals
        self._numbers = count()
        self._versions = count()  # of all callers: one who is forgotten may come back
        self._callers: dict[Hashable, _Caller] = {}
        # By when they are due; an entry of another version than its caller's is out of date.
        self._firsts: list[tuple[float, int, int, Hashable]] = []
        self._deadlines: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, seq: object) -> bool:
        return seq in self._waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in order of arrival."""
        return iter(self._waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence, whose ``arrived``, ``deadline`` and ``caller`` are settled."""
        number = self._waiting[seq] = next(self._numbers)
        caller = self._callers.setdefault(seq.caller, _Caller())
        heapq.heappush(caller.queue, (_due(seq, seq.arrived), number, seq))
        if seq.deadline is not None:
            heapq.heappush(self._deadlines, (seq.deadline, number, seq))
        self._update(seq.caller)

    def first(self) -> Sequence | None:
        """The one that gets the next slot; None if nobody waits."""
        while self._firsts:
            _, _, version, name = self._firsts[0]
            caller = self._callers.get(name)
            if caller is not None and caller.version == version:
                return caller.queue[0][2]
            heapq.heappop(self._firsts)
        return None

    def remove(self, seq: Sequence) -> None:
        """Let a sequence wait no more."""
        del self._waiting[seq]
        caller = self._callers[seq.caller]
        caller.num_gone += 1
        if caller.queue[0][2] is seq or 2 * caller.num_gone > len(caller.queue):
            self._update(seq.caller)
        if len(self._deadlines) > 2 * len(self._waiting) + 16:
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._waiting]
            heapq.heapify(self._deadlines)

    def grant(self, seq: Sequence, now: float) -> None:
        """Count the slot that a sequence gets, and let it wait no more if it did."""
        caller = self._callers.setdefault(seq.caller, _Caller())
        caller.held += 1
        caller.granted = now
        if seq in self._waiting:
            self.remove(seq)
        self._update(seq.caller)

    def release(self, seq: Sequence) -> None:
        """Count the slot that a sequence gives back."""
        self._callers[seq.caller].held -= 1
        self._update(seq.caller)

    def late(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed, which still wait."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, seq = heapq.heappop(self._deadlines)
            if seq in self._waiting:
                found.append(seq)
        return found

    def held(self) -> dict[Hashable, int]:
        """How many slots each caller holds who holds some."""
        return {name: caller.held for name, caller in self._callers.items() if caller.held}

    def _update(self, name: Hashable) -> None:
        """See where a caller stands after something has changed for it."""
        caller = self._callers[name]
        caller.version = next(self._versions)
        if 2 * caller.num_gone > len(caller.queue):
            caller.queue = [entry for entry in caller.queue if entry[2] in self._waiting]
            heapq.heapify(caller.queue)
            caller.num_gone = 0
        while caller.queue and caller.queue[0][2] not in self._waiting:
            heapq.heappop(caller.queue)
            caller.num_gone -= 1
        if caller.queue:
            _, number, seq = caller.queue[0]
            due = _due(seq, max(seq.arrived, caller.granted)) + AGEING * caller.held
            heapq.heappush(self._firsts, (due, number, caller.version, name))
        elif not caller.held:
            del self._callers[name]
        if len(self._firsts) > 2 * len(self._callers) + 16:
            self._firsts = [entry for entry in self._firsts if self._is_current(entry)]
            heapq.heapify(self._firsts)

    def _is_current(self, entry: tuple[float, int, int, Hashable]) -> bool:
        caller = self._callers.get(entry[3])
        return caller is not None and caller.version == entry[2]


@dataclass(slots=True)
class _Caller:
    """What one caller has.

    Attributes:
        queue: its sequences that wait, and some that don't any more: a heap by when they are due.
        num_gone: how many of those there are.
        held: slots that it holds.
        granted: when it was given one for the last time.
        version: of its last change.
    """

    queue: list[tuple[float, int, Sequence]] = field(default_factory=list)
    num_gone: int = 0
    held: int = 0
    granted: float = -inf
    version: int = 0


def _due(seq: Sequence, since: float) -> float:
    due = since + AGEING * seq.params.priority
    return due if seq.deadline is None else min(due, seq.deadline)
