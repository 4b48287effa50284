"""The bodies that are being read: all of them together may have so many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama_runtime.errors import QueueFullError


class Bodies:
    """Counts what has come of the bodies that are being read.

    A body that is whole is counted by the gate, as tokens. Until then its client takes its time,
    and any number of clients may: so this is what bounds the memory that they can fill. What is
    announced and hasn't come is no memory, and shuts nobody out.

    Args:
        limit: bytes that all of them may have.

    Attributes:
        size: bytes that are here.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit

    @contextmanager
    def arriving(self, announced: int) -> Iterator[Callable[[int], None]]:
        """Count a body while it comes; what is given is to be called with the bytes of each part.

        Args:
            announced: bytes that it will have, or 0 if that isn't known.

        Raises:
            QueueFullError: they don't fit beside those that are here; raised by what is given too.
        """
        taken = 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            self._check(num_bytes)
            self.size += num_bytes
            taken += num_bytes

        self._check(announced)
        try:
            yield take
        finally:
            self.size -= taken

    def _check(self, more: int) -> None:
        if self.size + more > self._limit:
            raise QueueFullError(
                f"{self.size:,} bytes of bodies are being read, of at most {self._limit:,}, and "
                f"{more:,} more don't fit: try again later"
            )
