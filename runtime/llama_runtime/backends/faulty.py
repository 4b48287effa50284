"""A backend that fails when it is told to, for tests and load tests of what comes after a fault."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.base import Backend
from llama_runtime.errors import BackendError
from llama_runtime.step_batch import Step

Fault = Literal["raise", "nan", "hang"]


class Faulty:
    """Another backend with faults at given steps.

    - "raise": the step is run, so that the cache is written, and ends in a ``BackendError``;
    - "nan": its logits are no numbers;
    - "hang": it waits until ``released`` is set, and then runs as any other.

    Steps are numbered from 0 as they come; one that the engine repeats, to find whose fault it was,
    has a number of its own. So a fault of the whole step doesn't come again when its sequences run
    alone. One of a victim does: it begins at its number and holds from there on, in steps that the
    victim takes part in.

    Args:
        backend: runs the steps; this one owns and closes it.
        faults: what happens, by number of the step.
        victim: the id of the only sequence that is struck; None strikes all of the step.

    Attributes:
        num_steps: how many have come.
        hanging: set as soon as a step waits.
        released: what it waits for.
    """

    def __init__(
        self, backend: Backend, faults: Mapping[int, Fault], *, victim: int | None = None
    ) -> None:
        self._backend = backend
        self._faults = dict(faults)
        self._victim = victim
        self.num_steps = 0
        self.hanging = threading.Event()
        self.released = threading.Event()

    @property
    def row_multiple(self) -> int:
        """See ``Backend.row_multiple``."""
        return self._backend.row_multiple

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        fault = self._fault(step)
        number, self.num_steps = self.num_steps, self.num_steps + 1
        if fault == "hang":
            self.hanging.set()
            self.released.wait()
        logits = self._backend.run(step)
        if fault == "raise":
            raise BackendError(f"step {number} was told to fail")
        if fault == "nan":
            logits[self._struck_rows(step)] = np.nan
        return logits

    def clean(self, slot: int, num_tokens: int) -> None:
        """See ``Backend.clean``."""
        self._backend.clean(slot, num_tokens)

    def save_block(self, slot: int, start: int, block: int) -> None:
        """See ``Backend.save_block``."""
        self._backend.save_block(slot, start, block)

    def load_block(self, slot: int, start: int, block: int) -> None:
        """See ``Backend.load_block``."""
        self._backend.load_block(slot, start, block)

    def close(self) -> None:
        """See ``Backend.close``."""
        self._backend.close()

    def _fault(self, step: Step) -> Fault | None:
        if self._victim is None:
            return self._faults.get(self.num_steps)
        if all(chunk.seq.id != self._victim for chunk in step.chunks):
            return None
        begun = [number for number in self._faults if number <= self.num_steps]
        return self._faults[max(begun)] if begun else None

    def _struck_rows(self, step: Step) -> list[int]:
        """The rows of logits that the step's fault is about."""
        sampled = [chunk.seq.id for chunk in step.chunks for _ in range(chunk.num_sampled)]
        scored = [chunk.seq.id for chunk in step.chunks for _ in range(chunk.num_scored)]
        owners = sampled + scored
        return [i for i, owner in enumerate(owners) if self._victim in (None, owner)]
