"""Work that is done a little ahead of need, in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1  # in which a thread that nobody needs any more notices it


class Prefetch(Generic[T]):
    """Draws from an iterator before anybody asks.

    Args:
        items: drawn from in another thread.
        most: how many items may wait at once.
    """

    def __init__(self, items: Iterator[T], most: int) -> None:
        self._items = items
        self._ready: queue.Queue[T] = queue.Queue(most)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._draw, name="prefetch", daemon=True)
        self._thread.start()

    def take(self, *, wait: bool) -> T | None:
        """The next item; None if there is none yet and ``wait`` is false.

        Raises:
            StopIteration: there are no more.
            Exception: what the iterator raised, after the items before it.
        """
        while True:
            ended = self._ended.is_set()  # asked first: what came before is in the queue by then
            try:
                return self._ready.get(timeout=_POLL_SECONDS if wait and not ended else 0)
            except queue.Empty:
                if ended:
                    raise (self._error or StopIteration) from None
                if not wait:
                    return None

    def close(self) -> None:
        """Draw no more. An item that the iterator is waiting for doesn't keep this waiting."""
        self._closed.set()

    def _draw(self) -> None:
        try:
            for item in self._items:
                while not self._closed.is_set():
                    try:
                        self._ready.put(item, timeout=_POLL_SECONDS)
                        break
                    except queue.Full:
                        continue
                if self._closed.is_set():
                    return
        except BaseException as error:  # it is raised where the items are taken
            self._error = error
        finally:
            self._ended.set()
