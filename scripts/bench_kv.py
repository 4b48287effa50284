"""The figures of scripts/bench_kv, which prepares what this needs.

usage: python -m scripts.bench_kv BUNDLE INT8_BUNDLE [--rounds N] [--threads N] [--batch N]...

One step of the graph at a time, as the engine would run it: a token of each sequence with so many
tokens in the cache, and a prompt's chunk of 128 that ends there. What is cached is made up, since
how long a step takes doesn't depend on it. The two bundles take turns, and a figure is the median
of its rounds; the machine's memory must hold the float32 cache.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.bundle import open_bundle
from llama_runtime.chunk import Chunk
from llama_runtime.contract import PROMPT_CHUNK, SLOTS
from llama_runtime.machine import default_threads
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.slots_precision import slots_cache_dtype
from llama_runtime.step_batch import Step, StepBatch
from scripts.bench_clock import seconds
from scripts.bench_machine import machine

CONTEXTS = (64, 512, 2048, 8000)
LEAST_SECONDS = 0.1  # of steps of one kind in a round: a step of a small model is short

Results = dict[str, Any]


class Steps:
    """The steps of one bundle, over a cache that is full of made-up numbers.

    Args:
        path: the bundle.
        threads: of the kernels.
        batch: sequences that decode at once.
    """

    def __init__(self, path: Path, threads: int, batch: int) -> None:
        bundle = open_bundle(path)
        self.dtype = slots_cache_dtype(bundle)
        geometry = bundle.manifest.geometry
        self._batch, self._vocab_size = batch, geometry.vocab_size
        self._backend = OrtCpu(
            open_session(bundle.graph_path(SLOTS.name), threads),
            geometry,
            num_slots=batch,
            capacity=max(CONTEXTS) + PROMPT_CHUNK,
            cache_dtype=self.dtype,
        )
        numbers = np.random.default_rng(0)
        for buffer in self._backend._cache:  # prompts of 8,000 tokens would take minutes
            for slot in buffer:
                made = numbers.standard_normal(slot.shape, np.float32)
                slot[:] = made if self.dtype == "float32" else np.clip(32 * made, -127, 127)
        self._step_batch = StepBatch(batch, PROMPT_CHUNK, self._backend.row_multiple)

    def decode(self, context: int) -> Step:
        """A step of a token of each sequence, the last of so many."""
        return self._step([(slot, context - 1, 1) for slot in range(self._batch)])

    def prompt(self, context: int) -> Step:
        """A step of a prompt's chunk, the last of so many tokens."""
        count = min(PROMPT_CHUNK, context)
        return self._step([(0, context - count, count)])

    def seconds(self, step: Step) -> float:
        """How long a step takes, on average of several."""
        once = seconds(lambda: self._backend.run(step))
        count = max(1, round(LEAST_SECONDS / once))
        return seconds(lambda: [self._backend.run(step) for _ in range(count)]) / count

    def close(self) -> None:
        """Give the memory back."""
        self._backend.close()

    def _step(self, places: list[tuple[int, int, int]]) -> Step:
        chunks = []
        for slot, start, count in places:
            tokens = [(7 * i) % self._vocab_size for i in range(start + count)]
            params = SamplingParams()
            seq = Sequence(slot, tokens, len(tokens), params, 0, None, slot=slot)  # type: ignore[arg-type]
            seq.cache_len = start
            chunks.append(Chunk(seq, count))
        return self._step_batch.build(chunks)


def compared(both: list[Steps], kind: str, context: int, rounds: int) -> Results:
    """Medians of the rounds of each, and of the ratios of rounds run in turns."""
    seen: list[list[float]] = [[], []]
    steps = [getattr(one, kind)(context) for one in both]
    for number in range(rounds):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        for i in order:
            seen[i].append(both[i].seconds(steps[i]))
    ratios = sorted(whole / small for whole, small in zip(*seen, strict=True))
    return {
        "float32_ms": 1e3 * median(seen[0]),
        "int8_ms": 1e3 * median(seen[1]),
        "ratio": median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
    }


def main() -> None:
    """Compare two bundles; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Measure steps with an int8 cache.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("int8_bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5, help="at least 1 (default: 5)")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--batch", type=int, action="append", help="(default: 1 and 8)")
    options = parser.parse_args()
    batches = options.batch or [1, 8]
    if min(options.rounds, options.threads, *batches) < 1:
        parser.error("--rounds, --threads and --batch must be at least 1")
    results: Results = {**machine(), "threads": options.threads, "rounds": options.rounds}
    for batch in batches:
        paths = (options.bundle, options.int8_bundle)
        both = [Steps(path, options.threads, batch) for path in paths]
        if [one.dtype for one in both] != ["float32", "int8"]:
            parser.error("the first bundle must have a float32 cache and the second an int8 one")
        for kind in ("decode", "prompt") if batch == min(batches) else ("decode",):
            for context in CONTEXTS:
                found = compared(both, kind, context, options.rounds)
                results.setdefault(kind, {}).setdefault(str(batch), {})[str(context)] = found
                print(
                    f"{kind}, {batch} at once, {context:>5} tokens: float32 "
                    f"{found['float32_ms']:8.2f} ms, int8 {found['int8_ms']:8.2f} ms, "
                    f"{found['ratio']:.2f}x as fast "
                    f"({found['ratio_low']:.2f} to {found['ratio_high']:.2f})",
                    flush=True,
                )
        for one in both:
            one.close()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
