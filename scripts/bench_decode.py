"""Decode and prefill beside ONNX Runtime GenAI, and the most that this machine could do."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llama_runtime.bundle import open_bundle
from scripts.bench_clock import seconds

BATCHES = {1: 1.25, 8: 1.5, 32: 1.7}  # and how many times the peer's speed is asked of us
PROMPT_TOKENS, NEW_TOKENS = 32, 64
SETTLE_SECONDS = 0.1  # the threads of the runner before spin a little while

Results = dict[str, Any]


def decode(bundle: Path, peer: Path | None, threads: int, rounds: int) -> Results:
    """Decode and prefill, by the public calls of both, in processes of their own."""
    results: Results = {}
    vocab_size = open_bundle(bundle).manifest.geometry.vocab_size
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        runners = {"caravan": stack.enter_context(_runner("caravan", bundle, threads))}
        if peer is not None:
            runners["genai"] = stack.enter_context(_runner("genai", peer, threads))
        for batch, target in BATCHES.items():
            prompts = rng.integers(0, vocab_size, (batch, PROMPT_TOKENS)).tolist()
            seen: dict[str, list[Results]] = {name: [] for name in runners}
            for child in runners.values():
                _ask(child, prompts)  # loads, packs weights, touches the cache
            for number in range(rounds):
                for name in sorted(runners, reverse=number % 2 == 1):  # who is first alternates
                    time.sleep(SETTLE_SECONDS)
                    seen[name].append(_ask(runners[name], prompts))
            results[str(batch)] = compared(seen, batch, target)
            _say_decode(batch, results[str(batch)])
    limit = results["limit"] = _limits(bundle, threads)
    if peer is not None:
        for batch in BATCHES:
            most = limit[f"tokens_per_s_{batch}"] / results[str(batch)]["genai_tokens_per_s"]
            limit[f"ratio_{batch}"] = most
        shown = ", ".join(f"{limit[f'ratio_{batch}']:.2f}x at {batch}" for batch in BATCHES)
        print(f"which is {shown} of what ONNX Runtime GenAI reached", flush=True)
    return results


def compared(seen: dict[str, list[Results]], batch: int, asked: float) -> Results:
    """Medians of the rounds of each runner, and of the ratios of rounds run in turns."""
    tokens = batch * (NEW_TOKENS - 1)
    result: Results = {}
    for name, answers in seen.items():
        result[f"{name}_tokens_per_s"] = tokens / median(a["decode_s"] for a in answers)
        result[f"{name}_prefill_s"] = median(a["prefill_s"] for a in answers)
    if "genai" in seen:
        pairs = list(zip(seen["caravan"], seen["genai"], strict=True))
        ratios = sorted(b["decode_s"] / a["decode_s"] for a, b in pairs)
        result |= {"ratio": median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1]}
        result["prefill_ratio"] = median(b["prefill_s"] / a["prefill_s"] for a, b in pairs)
        result["asked_ratio"] = asked
        result["rows_with_the_same_tokens"] = sum(
            a == b for a, b in zip(pairs[0][0]["token_ids"], pairs[0][1]["token_ids"], strict=True)
        )
    return result


def _say_decode(batch: int, result: Results) -> None:
    line = f"decode, {batch:>2} sequences: {result['caravan_tokens_per_s']:6.0f} tokens/s"
    if "ratio" in result:
        line += (
            f", ONNX Runtime GenAI {result['genai_tokens_per_s']:6.0f}; "
            f"{result['ratio']:.2f}x (rounds {result['ratio_low']:.2f} to "
            f"{result['ratio_high']:.2f}, asked {result['asked_ratio']}x); "
            f"prefill {result['prefill_ratio']:.2f}x; same greedy tokens in "
            f"{result['rows_with_the_same_tokens']} of {batch}"
        )
    print(line, flush=True)


def _limits(bundle: Path, threads: int) -> Results:
    """The most that any fp32 runtime could do here: weights read once a step, products at peak.

    Bytes per second are those of as many threads reading 256 MB each; FLOP/s those of numpy's
    matrix product, of a size that suits it.
    """
    weights = open_bundle(bundle).path / "model.safetensors"
    num_bytes = weights.stat().st_size
    bandwidth = max(_read_bandwidth(threads) for _ in range(5))
    side = 2048
    matrix = np.random.default_rng(0).standard_normal((side, side), np.float32)
    flops = 2 * side**3 / min(seconds(lambda: matrix @ matrix) for _ in range(5))
    result: Results = {"read_bytes_per_s": bandwidth, "flop_per_s": flops}
    for batch in BATCHES:
        # Two operations a weight and row; attention and all small operators at no cost.
        step = max(num_bytes / bandwidth, 2 * batch * num_bytes / 4 / flops)
        result[f"tokens_per_s_{batch}"] = batch / step
    shown = ", ".join(f"{result[f'tokens_per_s_{b}']:.0f} at {b}" for b in BATCHES)
    print(
        f"limit of this machine in fp32: {bandwidth / 1e9:.0f} GB/s and {flops / 1e9:.0f} GFLOP/s, "
        f"so at most {shown} tokens/s",
        flush=True,
    )
    return result


def _read_bandwidth(threads: int) -> float:
    arrays = [np.ones(2**26, np.float32) for _ in range(threads)]
    readers = [threading.Thread(target=array.max) for array in arrays]

    def read() -> None:
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()

    return sum(array.nbytes for array in arrays) / seconds(read)


@contextlib.contextmanager
def _runner(kind: str, model: Path, threads: int) -> Iterator[subprocess.Popen[str]]:
    script = Path(__file__).with_name("bench_runners.py")
    command = [sys.executable, str(script), kind, str(model), str(threads)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        yield child
        assert child.stdin is not None
        child.stdin.close()


def _ask(child: subprocess.Popen[str], prompts: list[list[int]]) -> Results:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps({"prompts": prompts, "max_tokens": NEW_TOKENS}) + "\n")
    child.stdin.flush()
    line = child.stdout.readline()
    if not line:
        sys.exit("a runner ended without an answer")
    answer: Results = json.loads(line)
    return answer
