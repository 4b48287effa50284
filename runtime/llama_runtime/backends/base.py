"""What the engine asks of the thing that runs the graph."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from llama_runtime.step_batch import Step


class Backend(Protocol):
    """Runs steps over a cache that it owns. Used from one thread at a time."""

    @property
    def row_multiple(self) -> int:
        """N and R must be multiples of it, so that no row's bits depend on how many there are."""

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """Run one forward and write the new tokens into the cache.

        Returns:
            Logits [R, V], valid until the next call.

        Raises:
            BackendError: the step failed, and the cache can't be trusted any more.
        """

    def clean(self, slot: int, num_tokens: int) -> None:
        """Zero the first tokens of a slot, before it changes hands after a fault.

        What isn't a number stays none when it is multiplied by 0, so attention must not meet it.
        """

    def close(self) -> None:
        """Give back what the backend holds; it can't run afterwards."""
