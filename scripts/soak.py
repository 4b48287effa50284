"""Requests of every kind through one LLM, with its memory watched.

What a process holds is looked at twice: the system's count of its private pages, which has all of
it and is noisy, and Python's count of its own blocks, which shows the smallest leak of an object.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llama_runtime.completion import Request
from llama_runtime.errors import RequestError
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams

MAX_BATCH, MAX_LEN = 16, 160
SAMPLES = 20
MOST_BYTES = 1_000  # private memory per request that passes for noise
MOST_BLOCKS = 0.5  # Python blocks per request; a leaked object has several


@dataclass(slots=True)
class Figures:
    """What a soak found.

    Attributes:
        requests: how many were given to the LLM.
        failed: those refused, because they were made wrong.
        aborted: those of batches that were given up.
        dropped: streams that were given up.
        seconds: how long it took.
        private_bytes: private memory at the start of what is measured, and at its end.
        bytes_per_request: slope of the private memory.
        blocks_per_request: slope of the Python blocks.
    """

    requests: int = 0
    failed: int = 0
    aborted: int = 0
    dropped: int = 0
    seconds: float = 0.0
    private_bytes: tuple[int, int] = (0, 0)
    bytes_per_request: float = 0.0
    blocks_per_request: float = 0.0

    @property
    def steady(self) -> bool:
        """Whether memory stays as it is."""
        return self.bytes_per_request <= MOST_BYTES and self.blocks_per_request <= MOST_BLOCKS


class Soak:
    """Random use of an LLM.

    Args:
        llm: one of ``MAX_BATCH`` and ``MAX_LEN``; what it holds must have been touched.
        seed: the same seed gives the same requests.
    """

    def __init__(self, llm: LLM, seed: int) -> None:
        self.figures = Figures()
        self._llm = llm
        self._choose = random.Random(seed)
        self._vocab_size = llm.bundle.manifest.geometry.vocab_size

    def touch_everything(self) -> None:
        """Fill every slot to its end, so that no page of the cache is new afterwards."""
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        self._llm.generate([[1] * (MAX_LEN - 2)] * MAX_BATCH, params)
        for _ in range(4):
            self.use()

    def use(self) -> None:
        """One random use: a batch, a batch that is given up, streams, or a mistake."""
        kinds: list[Callable[[], None]] = [
            self._batch,
            self._batch,
            self._batch,
            self._abandoned_batch,
            self._abandoned_streams,
            self._mistake,
        ]
        self._choose.choice(kinds)()

    def _batch(self) -> None:
        for _, completion in self._llm.run(self._requests()):
            self.figures.failed += completion.error is not None

    def _abandoned_batch(self) -> None:
        requests = list(self._requests())
        for _ in self._llm.run(requests):
            break
        self.figures.aborted += len(requests) - 1

    def _abandoned_streams(self) -> None:
        streams = [self._llm.stream(one.prompt, one.params) for one in self._requests()]
        for stream in streams[::2]:
            next(stream)
        for stream in streams[::3]:
            stream.close()
        self.figures.dropped += len(streams)  # the others go with the list

    def _mistake(self) -> None:
        wrong = self._choose.choice([[], [self._vocab_size], [1] * MAX_LEN])
        try:
            self._llm.generate([wrong, [1, 2]], SamplingParams(max_tokens=4))
        except RequestError:
            self.figures.failed += 1
        self.figures.requests += 2

    def _requests(self) -> Iterator[Request]:
        for _ in range(self._choose.randint(1, 2 * MAX_BATCH)):
            self.figures.requests += 1
            length = min(self._choose.randint(1, 40), self._choose.randint(1, 140))
            prompt = [self._choose.randrange(self._vocab_size) for _ in range(length)]
            yield Request(
                prompt,
                SamplingParams(
                    max_tokens=self._choose.randint(1, 12),
                    temperature=self._choose.choice([0.0, 1.0]),
                    top_p=self._choose.choice([0.9, 1.0]),
                ),
            )


def soak(llm: LLM, requests: int, seed: int, say: Callable[[str], None]) -> Figures:
    """Run at least ``requests`` requests, and fit a line through what memory was held meanwhile.

    Args:
        llm: see ``Soak``.
        requests: after a tenth of them memory is expected to stay.
        seed: see ``Soak``.
        say: told the figures while it runs.
    """
    use, started = Soak(llm, seed), time.monotonic()
    use.touch_everything()
    figures, points = use.figures, []
    for sample in range(SAMPLES + 1):
        while figures.requests < requests * (0.1 + 0.9 * sample / SAMPLES):
            use.use()
        gc.collect()
        points.append((figures.requests, private_bytes(), sys.getallocatedblocks()))
        say(
            f"{points[-1][0]:7,} requests  {points[-1][1] / 1e6:9.1f} MB private  "
            f"{points[-1][2]:9,} Python blocks"
        )
    done, held, blocks = (np.array(column, float) for column in zip(*points, strict=True))
    figures.seconds = time.monotonic() - started
    figures.private_bytes = int(held[0]), int(held[-1])
    figures.bytes_per_request = float(np.polyfit(done, held, 1)[0])
    figures.blocks_per_request = float(np.polyfit(done, blocks, 1)[0])
    return figures


def private_bytes() -> int:
    """Resident private memory of this process; pages of files can be dropped and don't count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def main() -> None:
    """The command line of ``scripts/prove_memory``."""
    parser = argparse.ArgumentParser(prog="scripts/prove_memory")
    parser.add_argument("bundle", nargs="?", default="bundle")
    parser.add_argument("requests", nargs="?", type=int, default=5000)
    given = parser.parse_args()
    with LLM(given.bundle, max_batch=MAX_BATCH, max_len=MAX_LEN) as llm:
        print(llm.memory_plan.summary())
        figures = soak(llm, given.requests, seed=1, say=lambda line: print(line, flush=True))
    print(
        f"{figures.requests:,} requests, of which {figures.failed:,} failed, {figures.aborted:,} "
        f"were aborted and {figures.dropped:,} streams dropped, in {figures.seconds:.0f} s: "
        f"{figures.bytes_per_request:.0f} bytes and {figures.blocks_per_request:.2f} blocks a "
        f"request (at most {MOST_BYTES:,} and {MOST_BLOCKS})"
    )
    print(json.dumps(asdict(figures) | {"steady": figures.steady}))
    sys.exit(0 if figures.steady else 1)


if __name__ == "__main__":
    main()
