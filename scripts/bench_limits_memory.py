"""What a process with a bundle open holds in memory when every slot is full.

python -m scripts.bench_limits_memory BUNDLE [--slots N] [--max-len N] [--threads N]

A process of its own, because the system keeps the most that one ever held. No prompt is kept for
others, which would be a second cache. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from llama_runtime import LLM, SamplingParams
from llama_runtime.machine import default_threads
from scripts.bench_limits_work import weight_file

SLOTS, MAX_LEN = 8, 2048
NEW_TOKENS = 2  # of each sequence; the rest of its slot is prompt

Results = dict[str, Any]


def filled(path: Path, slots: int, max_len: int, threads: int) -> Results:
    """Open a bundle and fill its slots to the end.

    Args:
        path: the bundle.
        slots: sequences that run at once.
        max_len: tokens of each, prompt and completion.
        threads: of the kernels.

    Returns:
        Bytes: what the process held at most (``peak``), and at most before it ran anything
        (``peak_loading``); what it holds at either moment by kind (``loaded``, ``filled``); the
        weight file (``weights``) and the cells of the slots (``cache``); and over these two
        ``ratio``, the peak, and ``own_ratio``, without pages of files, which the system takes back
        where memory is short.
    """
    with LLM(path, max_batch=slots, max_len=max_len, threads=threads, prefix_tokens=0) as llm:
        loaded = held()
        vocab_size = llm.bundle.manifest.geometry.vocab_size
        ids = np.random.default_rng(0).integers(0, vocab_size, (slots, max_len - NEW_TOKENS))
        llm.generate(ids.tolist(), SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))
        last = held()
        weights = weight_file(llm.bundle).stat().st_size
        cache = llm.memory_plan.token_bytes * slots * max_len
    return {
        "slots": slots,
        "max_len": max_len,
        "peak": last["peak"],
        "peak_loading": loaded["peak"],
        "loaded": loaded,
        "filled": last,
        "weights": weights,
        "cache": cache,
        "ratio": last["peak"] / (weights + cache),
        "own_ratio": last["own"] / (weights + cache),
    }


def held() -> dict[str, int]:
    """Bytes that this process holds: of its own, of mapped files, both, and the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {"own": "RssAnon", "files": "RssFile", "resident": "VmRSS", "peak": "VmHWM"}
    return {
        kind: 1024 * int(line.split()[1])
        for kind, field in fields.items()
        for line in lines
        if line.startswith(f"{field}:")
    }


def main() -> None:
    """Fill one bundle's slots; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Measure what a full bundle holds in memory.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--slots", type=int, default=SLOTS)
    parser.add_argument("--max-len", type=int, default=MAX_LEN)
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    print(json.dumps(filled(options.bundle, options.slots, options.max_len, options.threads)))


if __name__ == "__main__":
    main()
