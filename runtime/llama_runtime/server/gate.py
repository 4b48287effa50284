"""What may come in before its prompt is made of tokens, and the threads that make it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.server.sizes import estimated_tokens

T = TypeVar("T")


class Place:
    """The place of one request, from its body until the engine has its prompt.

    Args:
        gate: that it is of.
        tokens: of its prompts, as far as is known.
    """

    def __init__(self, gate: Gate, tokens: int) -> None:
        self.tokens = tokens
        self._gate = gate
        self._work: Future[object] | None = None

    async def run(self, work: Callable[[], T]) -> T:
        """Do something in one of the threads.

        Whoever waits may be cancelled: then the place is held until the thread is done with it, so
        that clients who ask and go don't fill the threads.
        """
        future = self._gate.pool.submit(work)
        self._work = future  # type: ignore[assignment]  # of which only the end counts
        return await asyncio.wrap_future(future)

    def leave(self) -> None:
        """The engine counts it from now on, or nothing comes of it."""
        if self._work is None or self._work.done():
            self._gate.places.discard(self)
            return
        loop = asyncio.get_running_loop()

        def done(_: Future[object]) -> None:
            with suppress(RuntimeError):  # the loop has ended, and the gate with it
                loop.call_soon_threadsafe(self._gate.places.discard, self)

        self._work.add_done_callback(done)

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.leave()


class Gate:
    """Lets requests in by number and by prompt tokens, which it estimates from their bytes.

    The engine's own admission counts tokens, and those it has too. So a request that will be
    refused costs no more than its bytes.

    Args:
        threads: that read, render and tokenise.

    Attributes:
        places: the requests that the engine doesn't count yet.
        pool: the threads.
    """

    def __init__(self, threads: int) -> None:
        self.places: set[Place] = set()
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="caravan-text")

    def enter(self, llm: AsyncLLM, num_bytes: int) -> Place:
        """A place for a request of so many bytes.

        Raises:
            QueueFullError: as much waits as may.
            CaravanError: the engine takes nothing any more.
        """
        llm.check_room(len(self.places), sum(place.tokens for place in self.places))
        place = Place(self, estimated_tokens(num_bytes))
        self.places.add(place)
        return place

    def close(self) -> None:
        """End the threads, as soon as what they do is done."""
        self.pool.shutdown(wait=False, cancel_futures=True)
