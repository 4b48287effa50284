"""What a step costs around the graph, and what continuous batching gains."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime import Engine, SamplingParams, open_bundle
from llama_runtime.backends.base import Backend
from llama_runtime.backends.fake import Fake
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.bundle import Bundle
from llama_runtime.contract import SLOTS, cache_capacity
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from llama_runtime.token_bytes import TokenBytes
from llama_runtime.tokenizer import Tokenizer
from scripts.bench_clock import seconds

NUM_SLOTS = 32
CHUNK, PROMPT_BUDGET = 128, 256  # as `LLM` has them
NUM_REQUESTS, SHORTEST, LONGEST = 256, 16, 256  # of `mixed`, prompts and completions alike
ASKED_MS_AROUND, ASKED_TO_FIXED, ASKED_TO_PADDED = 1.5, 0.9, 0.6

Results = dict[str, Any]


def around(bundle_path: Path, rounds: int) -> Results:
    """Schedule, arrays, 32 greedy rows over the vocabulary, text and events, on ``Fake``."""
    bundle, table = _open(bundle_path)
    max_len = 256
    timed = Timed(NUM_SLOTS, cache_capacity(max_len, CHUNK), bundle.manifest.geometry.vocab_size)
    figures = []
    for _ in range(rounds):
        engine = _engine(timed, bundle, table, max_len)
        for i in range(NUM_SLOTS):
            prompt = list(range(i, i + 32))
            engine.add(prompt, SamplingParams(max_tokens=200, ignore_eos=True))
        while engine.has_work:
            whole = seconds(engine.step)
            if timed.decoding == NUM_SLOTS:
                figures.append(whole - timed.seconds)
    ms = 1e3 * median(figures)
    print(f"around the graph, {NUM_SLOTS} rows: {ms:.2f} ms a step (asked {ASKED_MS_AROUND} ms)")
    return {"ms_per_step": ms, "asked_ms_per_step": ASKED_MS_AROUND, "steps": len(figures)}


class Timed(Fake):
    """Notes what its last step was.

    Attributes:
        seconds: how long it took.
        decoding: how many sequences decoded in it, 0 if there was a prompt.
    """

    seconds: float = 0.0
    decoding: int = 0

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        started = time.perf_counter()
        logits = super().run(step)
        self.seconds = time.perf_counter() - started
        self.decoding = len(step.chunks) if step.unpack.shape[1] == 1 else 0
        return logits


@dataclass(frozen=True)
class Way:
    """One way of batching: lengths of prompts and completions, and whether slots are refilled."""

    lengths: list[tuple[int, int]]
    refill: bool


def mixed(bundle_path: Path, threads: int, rounds: int) -> Results:
    """256 requests of 16 to 256 tokens in and out, 32 at a time, batched in three ways."""
    three = ways()
    bundle, table = _open(bundle_path)
    geometry, max_len = bundle.manifest.geometry, 2 * LONGEST
    session = open_session(bundle.graph_path(SLOTS.name), threads)
    capacity = cache_capacity(max_len, CHUNK)
    backend = OrtCpu(session, geometry, num_slots=NUM_SLOTS, capacity=capacity)
    times: dict[str, list[float]] = {name: [] for name in three}
    for number in range(rounds):
        for name in sorted(three, reverse=number % 2 == 1):
            engine = _engine(backend, bundle, table, max_len, refill=three[name].refill)
            rng = np.random.default_rng(1)
            for num_prompt_tokens, max_tokens in three[name].lengths:
                prompt = rng.integers(0, geometry.vocab_size, num_prompt_tokens).tolist()
                engine.add(prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
            started = time.perf_counter()
            _finish(engine)
            times[name].append(time.perf_counter() - started)
            print(f"mixed, round {number + 1}, {name}: {times[name][-1]:.1f} s", flush=True)

    def ratio(name: str) -> float:
        return median(a / b for a, b in zip(times["continuous"], times[name], strict=True))

    wanted = sum(max_tokens for _, max_tokens in three["continuous"].lengths)
    results: Results = {f"{name}_s": median(several) for name, several in times.items()}
    results |= {
        "tokens_per_s": wanted / results["continuous_s"],
        "ratio_to_fixed": ratio("fixed"),
        "asked_ratio_to_fixed": ASKED_TO_FIXED,
        "ratio_to_padded": ratio("padded"),
        "asked_ratio_to_padded": ASKED_TO_PADDED,
    }
    print(
        f"mixed lengths: {results['tokens_per_s']:.0f} tokens/s; continuous batching takes\n"
        f"  {results['ratio_to_fixed']:.2f} of the time of fixed batches whose finished rows idle "
        f"(asked {ASKED_TO_FIXED})\n"
        f"  {results['ratio_to_padded']:.2f} of the time of fixed batches with padded prompts and "
        f"finished rows computed to the end, as naive batching does (asked {ASKED_TO_PADDED})",
        flush=True,
    )
    return results


def ways() -> dict[str, Way]:
    """The same requests, batched in three ways."""
    rng = np.random.default_rng(0)
    lengths = [
        (int(prompt), int(new))
        for prompt, new in rng.integers(SHORTEST, LONGEST + 1, (NUM_REQUESTS, 2))
    ]
    groups = [lengths[i : i + NUM_SLOTS] for i in range(0, NUM_REQUESTS, NUM_SLOTS)]
    # Padding and rows that run on cost what real tokens cost: every row is its batch's longest.
    padded = [
        (max(prompt for prompt, _ in group), max(new for _, new in group))
        for group in groups
        for _ in group
    ]
    return {
        "continuous": Way(lengths, refill=True),
        "fixed": Way(lengths, refill=False),
        "padded": Way(padded, refill=False),
    }


def _open(path: Path) -> tuple[Bundle, TokenBytes]:
    bundle = open_bundle(path)
    return bundle, Tokenizer(bundle.tokenizer_path).byte_table


def _engine(
    backend: Backend, bundle: Bundle, table: TokenBytes, max_len: int, *, refill: bool = True
) -> Engine:
    return slots_engine(
        backend,
        table,
        eos_token_ids=(),
        vocab_size=bundle.manifest.geometry.vocab_size,
        max_batch=NUM_SLOTS,
        max_len=max_len,
        prompt_budget=PROMPT_BUDGET,
        max_chunk=CHUNK,
        refill=refill,
    )


def _finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    if engine.failure is not None:
        raise engine.failure
