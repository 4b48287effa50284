"""A backend around another, for tests that watch what goes through it or spoil what it holds."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.base import Backend
from llama_runtime.step_batch import Step


class Wrapped:
    """Passes everything on; what else there is to do, a subclass says.

    Args:
        backend: runs the steps; this one owns and closes it.
    """

    def __init__(self, backend: Backend) -> None:
        self.row_multiple = backend.row_multiple
        self._backend = backend

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        return self._backend.run(step)

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


class Digested(Wrapped):
    """Keeps a digest of every row of logits that is sampled.

    Attributes:
        rows: by the sequence's id, in order.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.rows: dict[int, list[bytes]] = {}

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        logits = super().run(step)
        sampled = [chunk.seq.id for chunk in step.chunks for _ in range(chunk.num_sampled)]
        for sequence_id, row in zip(sampled, logits, strict=False):
            self.rows.setdefault(sequence_id, []).append(digest(row))
        return logits


def digest(row: npt.NDArray[np.float32]) -> bytes:
    """What stands for a row of logits, ``[vocab_size]``: equal rows have equal ones."""
    return blake2b(row.tobytes(), digest_size=16).digest()
