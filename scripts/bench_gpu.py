"""Figures of a CUDA GPU: whole steps of the engine, the sampler alone, whole runs of ``generate``.

Weights are random and have the shape of a published model; speed doesn't depend on their values,
but for the sampler: random logits are flat, which is the hardest case for top_p.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from llama_decoder.shapes import SHAPES
from llama_export.build import build_bundle
from llama_runtime import LLM, SamplingParams
from llama_runtime.cuda_loading import opened_devices
from llama_runtime.engine import Engine
from llama_runtime.loading import load
from llama_runtime.memory_plan import weight_bytes
from llama_runtime.settings import Settings
from scripts.bench_gpu_sampler import sampler
from scripts.bench_machine import machine

BANDWIDTH = 3.0e12  # bytes a second that copies reach on an H100 with 80 GB
CONTEXT = 256  # tokens in the cache, on average over the steps that are timed
LEAD, TIMED_STEPS = 16, 64
SPARE = 64  # the first prompts decode while the last ones run, and are to be there to the end
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
}
SECTIONS = ("decode", "sampler", "throughput", "headline", "peers")

Results = dict[str, Any]


def main() -> None:
    """Measure, print as it goes, and end with one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=SECTIONS)
    parser.add_argument("--shape", action="append", help="default: Llama-3.2-1B")
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/caravan"))
    parser.add_argument("--batch", type=int, action="append", help="default: 1, 8, 32, 128")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sections = args.only or SECTIONS[:-1]
    batches = args.batch or [1, 8, 32, 128]
    results: Results = {**machine(), **device(), "rounds": args.rounds}
    if "sampler" in sections:
        results["sampler"] = sampler(args.rounds)
    for shape in args.shape or ["Llama-3.2-1B"]:
        bundle = made(args.folder, shape, args.precision)
        found: Results = {}
        if "decode" in sections:
            found["decode"] = decode(bundle, batches, args.rounds)
        if "throughput" in sections:
            found["throughput"] = throughput(bundle)
        if "headline" in sections:
            found["headline"] = headline(bundle, args.rounds)
        if "peers" in sections:
            from scripts.bench_gpu_peers import peers

            found["peers"] = peers(args.folder, shape, batches, args.rounds)
        results[f"{shape} {args.precision}"] = found
    print(json.dumps(results))


def device() -> Results:
    """The GPU and its driver."""
    with opened_devices([0]) as (one,):
        _, total = one.memory()
        version = one._runtime.cudaDriverGetVersion()[1]
        found = {"gpu": one.name, "gpu_bytes": total, "cuda_driver": version}
        one.close()
    return found


def made(folder: Path, shape: str, precision: str) -> Path:
    """A bundle with random weights, made unless it is there."""
    bundle = folder / f"{shape}-{precision}"
    if not bundle.exists():
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        build_bundle(shape, bundle, target="cuda", precision=precision, random_seed=0)
        print(f"made {bundle.name} in {time.perf_counter() - started:.1f} s", flush=True)
    return bundle


def decode(bundle: Path, batches: list[int], rounds: int) -> list[Results]:
    """Milliseconds of a whole step of the engine that decodes so many sequences."""
    loaded = load(
        bundle,
        Settings(max_batch=max(batches), max_len=CONTEXT + TIMED_STEPS + SPARE),
        verify="size",
    )
    engine, manifest = loaded.engine, loaded.encoder.bundle.manifest
    assert isinstance(engine, Engine)
    g = manifest.geometry
    weights = weight_bytes(manifest, "paged")
    if not SHAPES[manifest.source.file].tie_embeddings:
        weights -= 2 * g.vocab_size * g.hidden_size  # only rows of the embedding are read
    results = []
    for batch in batches:
        result: Results = {"batch": batch}
        for kind, options in KINDS.items():
            # In the first one graphs are captured.
            found = [_timed_steps(engine, g.vocab_size, batch, options) for _ in range(rounds + 1)]
            step, replay = (statistics.median(times) for times in zip(*found[1:], strict=True))
            result[kind] = step
        cached = batch * CONTEXT * 2 * g.num_layers * g.num_kv_heads * g.head_dim * 2
        result["floor"] = floor = 1e3 * (weights + cached) / BANDWIDTH
        result |= {"replay": replay, "over_floor": result["greedy"] / floor}
        result["host_share"] = max(0.0, 1 - replay / step)
        results.append(result)
        print(
            f"{bundle.name} B={batch:<4} greedy {result['greedy']:.3f} ms, top_p {step:.3f} ms "
            f"({1e3 * batch / step:,.0f} tokens/s), the GPU alone {replay:.3f} ms "
            f"({result['host_share']:.1%} not hidden); greedy is {result['over_floor']:.2f} times "
            f"the floor of {floor:.3f} ms",
            flush=True,
        )
    free = loaded.memory_plan.available.num_bytes
    runner: Any = engine._runner
    print(f"{bundle.name}: {runner.num_graphs} graphs; {_used(runner, free)}", flush=True)
    engine.close()
    return results


def _used(runner: Any, free: int) -> str:
    left, _ = runner._device.memory()
    pool = runner._cache.num_blocks * runner._block_bytes * 2 * runner._num_layers
    return f"{(free - left - pool) / 1e6:,.0f} MB of the device are neither free nor cache"


def _timed_steps(
    engine: Engine, vocab_size: int, batch: int, options: dict[str, Any]
) -> tuple[float, float]:
    """Run a batch, and time the steps whose contexts lie around ``CONTEXT``; then the GPU alone."""
    rng = np.random.default_rng(1)
    length = CONTEXT - TIMED_STEPS // 2 - LEAD
    budget = LEAD + TIMED_STEPS + SPARE
    params = SamplingParams(max_tokens=budget, ignore_eos=True, seed=0, **options)
    for _ in range(batch):
        engine.add(rng.integers(0, vocab_size, length).tolist(), params)
    decoding = 0
    while decoding < LEAD:
        decoding += len(engine.step()) == batch
    started = time.perf_counter()
    for _ in range(TIMED_STEPS):
        engine.step()
    elapsed = time.perf_counter() - started
    replay = _replayed(engine)
    while engine.has_work:
        engine.step()
    engine.check()
    return 1e3 * elapsed / TIMED_STEPS, replay


def _replayed(engine: Engine) -> float:
    """Milliseconds of the step in flight, launched again and again with nothing between.

    What it writes is what it wrote, so the run goes on afterwards.
    """
    runner: Any = engine._runner
    layout, graph = next(reversed(runner._graphs.items()))  # the one that was used last
    rows = runner._inputs + layout.arrays["rows"][0]

    def launch(times: int) -> None:
        for _ in range(times):
            runner._device.launch(graph)
            runner._sampler.sample(runner._logits, rows, runner._masks.address, layout.num_logits)
        runner._device.synchronize()

    runner._device.use()
    launch(5)
    started = time.perf_counter()
    launch(50)
    return 1e3 * (time.perf_counter() - started) / 50


def throughput(bundle: Path, num_requests: int = 2048) -> Results:
    """Whole runs of ``LLM.generate``: 128 tokens in, 128 out, as many at once as fit.

    Of two runs the second counts: in the first one graphs are captured.
    """
    with LLM(bundle, max_batch=1024, max_len=CONTEXT, verify="size") as llm:
        rng = np.random.default_rng(2)
        vocab_size = llm.bundle.manifest.geometry.vocab_size
        prompts = rng.integers(0, vocab_size, (num_requests, 128)).tolist()
        params = SamplingParams(max_tokens=128, ignore_eos=True)
        print(llm.memory_plan.summary(), flush=True)
        llm.generate(prompts, params)
        started = time.perf_counter()
        done = llm.generate(prompts, params)
        elapsed = time.perf_counter() - started
    tokens = sum(len(completion.token_ids) for completion in done)
    print(
        f"{bundle.name}: {num_requests} requests of 128 in and 128 out in {elapsed:.2f} s, "
        f"{tokens / elapsed:,.0f} tokens/s out",
        flush=True,
    )
    return {"requests": num_requests, "seconds": elapsed, "tokens_per_second": tokens / elapsed}


def headline(bundle: Path, rounds: int) -> Results:
    """10 requests of 50 tokens: one after the other, and together."""
    with LLM(bundle, max_batch=10, max_len=CONTEXT, verify="size") as llm:
        prompts = [f"Request {i}: tell me something about llamas." for i in range(10)]
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        ways = {
            "sequential": lambda: [llm.generate(prompt, params) for prompt in prompts],
            "batched": lambda: llm.generate(prompts, params),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, run in ways.items():
                started = time.perf_counter()
                run()  # type: ignore[no-untyped-call]
                if number:
                    seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = medians["sequential"] / medians["batched"]
    print(
        f"{bundle.name}: 10 requests of 50 tokens, {ratio:.1f} times as fast together", flush=True
    )
    return {**medians, "ratio": ratio}


if __name__ == "__main__":
    main()
