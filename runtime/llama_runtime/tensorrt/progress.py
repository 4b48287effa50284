"""One fraction out of the nested phases in which TensorRT reports its progress."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(slots=True)
class _Phase:
    """A phase, and the part of the whole that it was given."""

    parent: _Phase | None
    begin: float
    end: float
    steps: int
    reached: float  # between the two
    done: int = 0

    def after(self, steps: int) -> float:
        return self.begin + (self.end - self.begin) * min(steps, self.steps) / self.steps


class PhaseTree:
    """The phases that are going on. TensorRT calls from threads of its own.

    How many phases a step of their parent will have isn't known. Each is given half of what is left
    of the step, so that the later ones still show.

    Attributes:
        cancelled: whether somebody wants the build to end.
        fraction: of the work that is done, 0 to 1; it never falls.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self.fraction = 0.0
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, within a step of its parent. Names are unique among those going on."""
        with self._lock:
            above = None if parent is None else self._phases.get(parent)
            begin, end = self.fraction, 1.0
            if above is not None:
                begin = above.reached
                end = begin + max(0.0, above.after(above.done + 1) - begin) / 2
            self._phases[name] = _Phase(above, begin, end, max(1, steps), begin)

    def step(self, name: str, step: int) -> None:
        """A step, from 0, of a phase is done."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = max(phase.done, step + 1)
                self._reach(phase, phase.after(phase.done))

    def finish(self, name: str) -> None:
        """A phase is over, whether or not all of its steps were reported."""
        with self._lock:
            phase = self._phases.pop(name, None)
            if phase is not None:
                self._reach(phase, phase.end)

    def _reach(self, phase: _Phase | None, place: float) -> None:
        self.fraction = max(self.fraction, place)
        while phase is not None:
            phase.reached = max(phase.reached, place)
            phase = phase.parent
