"""What holding completions to JSON schemas costs: to compile one, a token, and a batch."""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from llama_runtime import LLM, SamplingParams
from llama_runtime.grammar_masks import MaskFiller, Masks, forbid, mask_words
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.tokenizer import Tokenizer
from scripts.bench_clock import seconds
from scripts.bench_machine import machine
from tests.structured.schemas import SCHEMAS

ASKED_MS = 1.0  # a token, at a vocabulary of 128,256
MAX_TOKENS = 200  # of one walk
STREAMS, TOKENS = 32, 96  # of the batch
# Long enough that nothing ends before the measurement does.
LISTED = {"type": "array", "items": {"type": "string"}, "minItems": 1000}

Results = dict[str, Any]


def main() -> None:
    """Measure, and print the figures; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokenizer", type=Path, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    vocabularies = [args.bundle / "tokenizer.json", *args.tokenizer]
    results = {
        **machine(),
        "asked_ms": ASKED_MS,
        "vocabularies": [vocabulary(path) for path in vocabularies],
        "batch": batch(args.bundle, args.threads, args.rounds),
    }
    print(json.dumps(results))


def vocabulary(path: Path) -> Results:
    """Compiling every schema, and the parts of a token, along texts drawn at random."""
    table = Tokenizer(path).byte_table
    size = len(table)
    ends = [max(i for i in range(size) if not table.bytes_of(i))]
    compiler = GrammarCompiler(path, size, ends)
    opening = seconds(lambda: compiler.prepare(SamplingParams(regex="a").constraint))
    compiling: list[float] = []
    parts: dict[str, list[float]] = {"mask": [], "forbid": [], "accept": []}
    for seed, schema in enumerate(SCHEMAS.values()):
        constraint = SamplingParams(json_schema=schema).constraint
        started = perf_counter()
        compiler.prepare(constraint)
        compiling.append(perf_counter() - started)
        if constraint is not None:
            walk(compiler.matcher(constraint), size, ends[0], random.Random(seed), parts)
    tokens = [sum(of_token) for of_token in zip(*parts.values(), strict=True)]
    found: Results = {
        "tokenizer": str(path),
        "size": size,
        "opening_ms": 1e3 * opening,
        "compile_ms": spread(compiling),
        "token_ms": spread(tokens),
        **{f"{part}_ms": spread(times) for part, times in parts.items()},
    }
    print(
        f"{size:,} tokens: opened in {opening:.2f} s; {len(SCHEMAS)} schemas compile in "
        f"{shown(found['compile_ms'])}; a token costs {shown(found['token_ms'])}",
        flush=True,
    )
    return found


def walk(
    matcher: Any, size: int, end: int, choose: random.Random, parts: dict[str, list[float]]
) -> None:
    """Draw a text, and note the seconds of each part of each token."""
    masks: Masks = np.full((1, mask_words(size)), -1, np.int32)
    filler, logits = MaskFiller(1), np.zeros(size, np.float32)
    for _ in range(MAX_TOKENS):
        logits.fill(0)
        begin = perf_counter()
        filler.fill([(0, matcher, ())], masks)
        filled = perf_counter()
        forbid(logits, masks[0])
        forbidden = perf_counter()
        allowed = np.flatnonzero(logits == 0)
        token = end if logits[end] == 0 else int(allowed[choose.randrange(len(allowed))])
        if token == end:
            return
        before = perf_counter()
        matcher.accept(token)
        after = perf_counter()
        parts["mask"].append(filled - begin)
        parts["forbid"].append(forbidden - filled)
        parts["accept"].append(after - before)
        if matcher.is_complete:
            return


def spread(times: list[float]) -> Results:
    """Milliseconds: the median, the mean, the 99th percentile and the most."""
    ms = 1e3 * np.array(times)
    return {
        "median": float(np.median(ms)),
        "mean": float(ms.mean()),
        "p99": float(np.quantile(ms, 0.99)),
        "max": float(ms.max()),
    }


def shown(found: Results) -> str:
    """One phrase."""
    return "{median:.3f} ms (mean {mean:.3f}, p99 {p99:.2f}, most {max:.1f})".format(**found)


def batch(bundle: Path, threads: int | None, rounds: int) -> Results:
    """Seconds of a full batch whose completions are all held to a schema, and of one without."""
    free = SamplingParams(max_tokens=TOKENS, temperature=0.8, seed=1, ignore_eos=True)
    kinds = {"free": free, "held": replace(free, ignore_eos=False, json_schema=LISTED)}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    with LLM(bundle, max_batch=STREAMS, max_len=256, threads=threads) as llm:
        prompts = [llm.chat_prompt([{"role": "user", "content": "List all towns."}])] * STREAMS
        for number in range(rounds + 1):  # the first is thrown away
            for kind, params in kinds.items():
                each = [replace(params, seed=100 * number + i) for i in range(STREAMS)]
                taken[kind].append(seconds(lambda each=each: llm.generate(prompts, each)))  # type: ignore[misc]
    ratios = [free / held for free, held in zip(taken["free"][1:], taken["held"][1:], strict=True)]
    print(
        f"{STREAMS} streams of {TOKENS} tokens: held to a schema {median(ratios):.3f} times as "
        f"fast as free ({', '.join(f'{ratio:.3f}' for ratio in ratios)})",
        flush=True,
    )
    return {"streams": STREAMS, "tokens": TOKENS, "rounds": ratios, "speed": median(ratios)}


if __name__ == "__main__":
    main()
