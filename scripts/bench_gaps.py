"""Gaps between the tokens of streams, quiet and while prompts of 512 tokens come in.

Readers are tasks on one event loop. First nobody but them runs: the median gap is what a step that
decodes takes. Then two callers send one long prompt after another, and the gaps are measured again;
with the default budget, and with as large steps of prompts as a batch job has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from statistics import median
from typing import Any

import numpy as np

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.params import SamplingParams
from scripts.bench_machine import machine

PROMPT_TOKENS, CALLERS, ANSWER_TOKENS = 512, 2, 8
QUIET_TOKENS, BUSY_PROMPTS = 40, 6  # measured tokens of each stream, and prompts of each caller
STREAM_PROMPT, MAX_LEN = 64, 1024


class Readers:
    """Streams that are read as they come.

    Args:
        llm: runs them.
        count: how many.
        choose: makes their prompts.
    """

    def __init__(self, llm: AsyncLLM, count: int, choose: random.Random) -> None:
        self.gaps: list[float] = []
        self._measured = False
        self._llm = llm
        self._vocab_size = llm.bundle.manifest.geometry.vocab_size
        self._choose = choose
        self._started = 0
        self._tasks = [asyncio.create_task(self._read()) for _ in range(count)]

    async def all_started(self) -> None:
        """Wait until each has its first token."""
        while self._started < len(self._tasks):
            await asyncio.sleep(0.01)

    def measure(self, *, on: bool) -> list[float]:
        """Begin to measure, or end it and give the gaps in seconds."""
        self._measured = on
        gaps, self.gaps = self.gaps, []
        return gaps

    async def stop(self) -> None:
        """Leave the streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self) -> None:
        prompt = prompt_of(STREAM_PROMPT, self._vocab_size, self._choose)
        params = SamplingParams(max_tokens=MAX_LEN - STREAM_PROMPT, ignore_eos=True)
        last = None
        async with self._llm.stream(prompt, params) as stream:
            async for _ in stream:
                now = time.perf_counter()
                if last is None:
                    self._started += 1
                elif self._measured:
                    self.gaps.append(now - last)
                last = now


def prompt_of(length: int, vocab_size: int, choose: random.Random) -> list[int]:
    """Random tokens."""
    return [choose.randrange(vocab_size) for _ in range(length)]


async def busy(llm: AsyncLLM, choose: random.Random) -> list[float]:
    """Seconds that each long prompt took to its first token, and a few more."""
    vocab_size, seconds = llm.bundle.manifest.geometry.vocab_size, []

    async def caller() -> None:
        for _ in range(BUSY_PROMPTS):
            started = time.perf_counter()
            prompt = prompt_of(PROMPT_TOKENS, vocab_size, choose)
            await llm.generate(prompt, SamplingParams(max_tokens=1))
            seconds.append(time.perf_counter() - started)
            await llm.generate(
                prompt_of(STREAM_PROMPT, vocab_size, choose),
                SamplingParams(max_tokens=ANSWER_TOKENS, ignore_eos=True),
            )

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return seconds


async def one_round(llm: AsyncLLM, streams: int, seed: int) -> dict[str, float]:
    """The gaps of some streams, quiet and busy."""
    choose = random.Random(seed)
    readers = Readers(llm, streams, choose)
    await readers.all_started()
    figures: dict[str, float] = {}

    async def quiet() -> list[float]:
        readers.measure(on=True)
        while len(readers.gaps) < streams * QUIET_TOKENS:
            await asyncio.sleep(0.05)
        return readers.measure(on=False)

    before = await quiet()
    readers.measure(on=True)
    seconds = await busy(llm, choose)
    gaps = readers.measure(on=False)
    step = median(before + await quiet())  # the contexts have grown meanwhile
    await readers.stop()
    figures["decode_step_ms"] = 1e3 * step
    for name, q in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)):
        figures[f"gap_{name}_ms"] = 1e3 * float(np.percentile(gaps, q))
    figures["p99_in_steps"] = figures["gap_p99_ms"] / figures["decode_step_ms"]
    figures["prompt_seconds"] = median(seconds)
    figures["prompt_tokens_per_second"] = CALLERS * PROMPT_TOKENS / median(seconds)
    return figures


async def measure(given: argparse.Namespace, stream_budget: int | None) -> dict[str, Any]:
    """The median of several rounds with one budget."""
    async with await AsyncLLM.load(
        given.bundle,
        max_batch=given.streams + CALLERS,
        max_len=MAX_LEN,
        threads=given.threads,
        stream_budget=stream_budget,
        prefix_tokens=0,
    ) as llm:
        await one_round(llm, given.streams, 0)  # to warm up
        rounds = [await one_round(llm, given.streams, seed) for seed in range(given.rounds)]
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def main() -> None:
    """The command line of ``scripts/bench_gaps``."""
    parser = argparse.ArgumentParser(prog="scripts/bench_gaps")
    parser.add_argument("--bundle", default="bundle")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    found = {}
    for name, budget in (("default", None), ("128", 128), ("256", 256)):
        found[name] = asyncio.run(measure(given, budget))
        one = found[name]
        print(
            f"budget {name:>7}: decode step {one['decode_step_ms']:6.1f} ms, gaps p50 "
            f"{one['gap_p50_ms']:6.1f}  p90 {one['gap_p90_ms']:6.1f}  p99 {one['gap_p99_ms']:6.1f}"
            f"  max {one['gap_max_ms']:6.1f} ms; p99 {one['p99_in_steps']:.2f} steps; "
            f"{one['prompt_seconds']:.2f} s to a prompt's first token",
            flush=True,
        )
    print(json.dumps(machine() | {"streams": given.streams, "budgets": found}))


if __name__ == "__main__":
    main()
