"""What sampling costs, and what a step costs around the graph and the sampler."""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llama_export.sampler import save_sampler
from llama_runtime import Engine, SamplingParams
from llama_runtime.backends.fake import Fake
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.contract import cache_capacity
from llama_runtime.sampling import Int64s, Kernels, Logits, Reference
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from llama_runtime.tokenizer import Tokenizer
from scripts.bench_clock import seconds
from scripts.bench_machine import machine

VOCABULARIES = (49_152, 128_256)
ROWS = 32
ACTIVE, WAITING, ASKED_STEP_MS = 64, 10_000, 0.3
REQUESTS = 100_000
KINDS: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature": 0.8},
    "top_p within 256": {"temperature": 0.8, "top_p": 0.95},
    "top_k 50, top_p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "top_p beyond 256": {"temperature": 2.5, "top_p": 0.95},
}

Results = dict[str, Any]


def main() -> None:
    """Measure, and print the figures; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.json, for the text of events")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    args = parser.parse_args()
    results = {
        **machine(),
        "threads": args.threads,
        "rounds": args.rounds,
        "sampler": {str(v): sampler(v, args.threads, args.rounds) for v in VOCABULARIES},
        "bookkeeping": bookkeeping(args.tokenizer),
        "many": many(args.tokenizer, args.requests),
    }
    print(json.dumps(results))


def sampler(vocab_size: int, threads: int, rounds: int) -> Results:
    """Milliseconds for 32 rows of each kind, in the graph and in numpy."""
    rng = np.random.default_rng(0)
    # Steep enough that the likeliest 256 tokens mostly hold 0.95 at temperature 0.8.
    logits = rng.standard_normal((ROWS, vocab_size)).astype(np.float32) * 2
    for steep in logits:
        steep[rng.choice(vocab_size, 100, replace=False)] += rng.exponential(6, 100) + 4
    results: Results = {}
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder, "sampler.onnx")
        save_sampler(vocab_size, graph)
        compiled = OrtSampler(graph, vocab_size, threads)
        results["extra_bytes"] = _extra(compiled, logits)
        for name, options in KINDS.items():
            params = [SamplingParams(**options)] * ROWS  # type: ignore[arg-type]
            numbers = rng.random(ROWS).tolist()
            row: Results = {}
            for label, kernels in (("compiled", compiled), ("numpy", Reference())):
                choose = partial(kernels.choose, logits, params, numbers)
                row[label] = 1e3 * _median(choose, rounds)
            row["beyond_256"] = _beyond(logits, params[0], 256)
            results[name] = row
            print(
                f"V {vocab_size:>7,}, {ROWS} rows, {name:<17} {row['compiled']:6.2f} ms compiled, "
                f"{row['numpy']:6.2f} ms in numpy ({row['beyond_256']} rows keep over 256 tokens)",
                flush=True,
            )
        print(
            f"V {vocab_size:>7,}: {results['extra_bytes'] / 1e6:.0f} MB more while it ran, "
            f"{3 * logits.nbytes / 1e6:.0f} MB are planned for it",
            flush=True,
        )
    return results


def _extra(kernels: Kernels, logits: Logits) -> int:
    """How much the sampler keeps of memory after its first run, where most of the peak lies."""
    options = KINDS["top_k 50, top_p"]
    params = [SamplingParams(**options)] * len(logits)  # type: ignore[arg-type]
    before = _resident()
    kernels.choose(logits, params, [0.5] * len(logits))
    return _resident() - before


def _beyond(logits: Logits, params: SamplingParams, count: int) -> int:
    """How many rows keep more than so many tokens."""
    if params.top_p == 1 or params.greedy:
        return 0
    scaled = np.sort(logits.astype(np.float64) / params.temperature)[:, ::-1]
    weights = np.exp(scaled - scaled[:, :1])
    held = weights[:, :count].sum(axis=1) / weights.sum(axis=1)
    return int((held < params.top_p).sum()) if params.top_k == 0 else 0


class Timed(Fake):
    """Adds up its own time."""

    row_multiple = 1
    seconds = 0.0

    def run(self, step: Step) -> Logits:
        """See ``Backend.run``."""
        started = time.perf_counter()
        logits = super().run(step)
        self.seconds += time.perf_counter() - started
        return logits


class TimedKernels(Reference):
    """Kernels that add up their own time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def choose(self, logits: Logits, params: Any, numbers: Any) -> Int64s:
        """See ``Reference.choose``."""
        started = time.perf_counter()
        tokens = super().choose(logits, params, numbers)
        self.seconds += time.perf_counter() - started
        return tokens


def bookkeeping(tokenizer: Path) -> Results:
    """A step of 64 decoding sequences without graph and sampler, others waiting."""
    results: Results = {"asked_ms_per_step": ASKED_STEP_MS}
    for waiting in (0, WAITING):
        backend, kernels = Timed(ACTIVE, cache_capacity(400, 128), 512), TimedKernels()
        engine = _engine(tokenizer, backend, ACTIVE, kernels)
        for i in range(ACTIVE + waiting):
            engine.add([i % 512] * 4, SamplingParams(max_tokens=300, ignore_eos=True))
        for _ in range(10):
            engine.step()
        figures = []
        for _ in range(200):
            inside = backend.seconds + kernels.seconds
            whole = seconds(engine.step)
            figures.append(whole - (backend.seconds + kernels.seconds - inside))
        results[f"ms_per_step_{waiting}_waiting"] = 1e3 * median(figures)
        print(
            f"{ACTIVE} active, {waiting:>6,} waiting: {1e3 * median(figures):.3f} ms a step "
            f"(asked {ASKED_STEP_MS} ms)",
            flush=True,
        )
    return results


def many(tokenizer: Path, requests: int) -> Results:
    """Requests with every parameter, one after another: the memory after each tenth of them."""
    engine = _engine(tokenizer, Fake(ACTIVE, cache_capacity(400, 128), 512), ACTIVE, Reference())
    rng = np.random.default_rng(0)
    seen: list[int] = []
    done = added = 0
    started = time.perf_counter()
    while done < requests:
        while added < requests and engine.num_waiting < ACTIVE:
            engine.add(rng.integers(0, 512, int(rng.integers(1, 60))).tolist(), _params(added))
            added += 1
        done += sum(event.finish_reason is not None for event in engine.step())
        if done * 10 // requests > len(seen):
            seen.append(_resident())
    growth = seen[-1] - seen[1]
    print(
        f"{requests:,} requests in {time.perf_counter() - started:.0f} s; from the second tenth on "
        f"memory grew by {growth / 1e6:.1f} MB of {seen[1] / 1e6:.0f} MB",
        flush=True,
    )
    return {"requests": requests, "resident_bytes": seen, "growth_bytes": growth}


def _params(number: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=1 + number % 12,
        temperature=(number % 3) / 2,
        top_p=0.9 if number % 2 else 1.0,
        min_p=0.01 * (number % 4),
        repetition_penalty=1 + 0.1 * (number % 2),
        logit_bias={number % 512: 1.0},
        stop=("stop",) * (number % 2),
        logprobs=number % 5 == 0,
        top_logprobs=3 * (number % 5 == 0),
        prompt_logprobs=number % 7 == 0,
    )


def _engine(tokenizer: Path, backend: Any, num_slots: int, kernels: Kernels) -> Engine:
    return slots_engine(
        backend,
        Tokenizer(tokenizer).byte_table,
        (),
        vocab_size=512,
        max_batch=num_slots,
        max_len=400,
        prompt_budget=256,
        max_chunk=128,
        kernels=kernels,
    )


def _median(act: Callable[[], object], rounds: int) -> float:
    act()
    return median(seconds(act) for _ in range(rounds))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
