"""Requests of every kind through one ``AsyncLLM``, on one event loop after another.

The model is the fake backend: what is watched is the memory of everything around the graph.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.errors import QueueFullError, RequestError
from llama_runtime.params import SamplingParams
from scripts.soak import MOST_BLOCKS, MOST_BYTES, SAMPLES, private_bytes
from tests.runtime.conftest import use_fakes, write_fake_bundle

MAX_BATCH, MAX_LEN = 8, 128
AT_ONCE = 24  # uses that overlap, so that the queue fills


@dataclass(slots=True)
class Figures:
    """What a soak found.

    Attributes:
        requests: how many were made.
        refused: those made wrong, or too many for the queue.
        given_up: those that were cancelled, closed, dropped or timed out.
        seconds: how long it took.
        bytes_per_request: slope of the private memory.
        blocks_per_request: slope of the Python blocks.
    """

    requests: int = 0
    refused: int = 0
    given_up: int = 0
    seconds: float = 0.0
    bytes_per_request: float = 0.0
    blocks_per_request: float = 0.0

    @property
    def steady(self) -> bool:
        """Whether memory stays as it is."""
        return self.bytes_per_request <= MOST_BYTES and self.blocks_per_request <= MOST_BLOCKS


class AsyncSoak:
    """Random use of an ``AsyncLLM``.

    Args:
        llm: one of ``MAX_BATCH`` and ``MAX_LEN``.
        seed: the same seed asks for the same.
    """

    def __init__(self, llm: AsyncLLM, seed: int) -> None:
        self.figures = Figures()
        self._llm = llm
        self._choose = random.Random(seed)

    async def use(self, requests: int) -> None:
        """Go on until that many have been made."""
        await asyncio.gather(*(self._one_after_another(requests) for _ in range(AT_ONCE)))

    async def _one_after_another(self, requests: int) -> None:
        kinds = [self._stream, self._stream, self._batch, self._leave, self._cancel, self._hurry]
        while self.figures.requests < requests:
            try:
                await self._choose.choice([*kinds, self._mistake])()
            except (RequestError, QueueFullError):
                self.figures.refused += 1
                await asyncio.sleep(0.001)
            except TimeoutError:
                self.figures.given_up += 1

    async def _stream(self) -> None:
        async for _ in self._llm.stream(self._text(), self._params()):
            pass

    async def _batch(self) -> None:
        count = self._choose.randint(1, 6)
        self.figures.requests += count - 1
        await self._llm.generate([self._text() for _ in range(count)], self._params())

    async def _leave(self) -> None:
        stream = self._llm.stream(self._text(), self._params(), timeout=60)
        if self._choose.random() < 0.8:
            await anext(stream)
        self.figures.given_up += 1
        if self._choose.random() < 0.5:
            await stream.aclose()  # else it goes with this frame

    async def _cancel(self) -> None:
        task = asyncio.create_task(self._stream())
        await asyncio.sleep(0.001 * self._choose.random())
        task.cancel()
        self.figures.given_up += 1
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()

    async def _hurry(self) -> None:
        await self._llm.generate(self._text(), self._params(), timeout=0.002)

    async def _mistake(self) -> None:
        wrong: Any = self._choose.choice(["", [10**6], [1] * MAX_LEN, [[1], []]])
        self.figures.requests += 1
        await self._llm.generate(wrong, self._params())

    def _text(self) -> str:
        self.figures.requests += 1
        return "x" * self._choose.randint(1, 40)

    def _params(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self._choose.randint(1, 12), temperature=self._choose.choice([0.0, 1.0])
        )


def soak(llm: AsyncLLM, requests: int, seed: int, say: Callable[[str], None]) -> Figures:
    """Make at least ``requests`` requests, and fit a line through what memory was held meanwhile.

    Args:
        llm: see ``AsyncSoak``.
        requests: after a tenth of them memory is expected to stay.
        seed: see ``AsyncSoak``.
        say: told the figures while it runs.
    """
    use, started, points = AsyncSoak(llm, seed), time.monotonic(), []
    # One loop throughout, and so the same threads: each new one may take memory of its own.
    with asyncio.Runner() as runner:
        for sample in range(SAMPLES + 1):
            runner.run(use.use(int(requests * (0.1 + 0.9 * sample / SAMPLES))))
            while llm.stats().running or llm.stats().waiting:
                time.sleep(0.001)
            gc.collect()
            points.append((use.figures.requests, private_bytes(), sys.getallocatedblocks()))
            say(
                f"{points[-1][0]:7,} requests  {points[-1][1] / 1e6:9.1f} MB private  "
                f"{points[-1][2]:9,} Python blocks"
            )
    done, held, blocks = (np.array(column, float) for column in zip(*points, strict=True))
    use.figures.seconds = time.monotonic() - started
    use.figures.bytes_per_request = float(np.polyfit(done, held, 1)[0])
    use.figures.blocks_per_request = float(np.polyfit(done, blocks, 1)[0])
    return use.figures


@contextmanager
def fake_llm() -> Iterator[AsyncLLM]:
    """One without a model, and with room for few that wait."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        use_fakes(patch)
        bundle = write_fake_bundle(Path(directory) / "bundle")
        llm = AsyncLLM(
            bundle,
            max_batch=MAX_BATCH,
            max_len=MAX_LEN,
            threads=1,
            max_queued_requests=2 * AT_ONCE,
        )
        try:
            yield llm
        finally:
            asyncio.run(llm.close())


def main() -> None:
    """The command line of ``scripts/prove_async_load``."""
    parser = argparse.ArgumentParser(prog="scripts/prove_async_load")
    parser.add_argument("requests", nargs="?", type=int, default=100_000)
    given = parser.parse_args()
    with fake_llm() as llm:
        figures = soak(llm, given.requests, seed=1, say=lambda line: print(line, flush=True))
    print(
        f"{figures.requests:,} requests, of which {figures.refused:,} were refused and "
        f"{figures.given_up:,} given up, in {figures.seconds:.0f} s: "
        f"{figures.bytes_per_request:.0f} bytes and {figures.blocks_per_request:.2f} blocks a "
        f"request (at most {MOST_BYTES:,} and {MOST_BLOCKS})"
    )
    print(json.dumps(asdict(figures) | {"steady": figures.steady}))
    sys.exit(0 if figures.steady else 1)


if __name__ == "__main__":
    main()
