#!/usr/bin/env python3
"""One runner of a benchmark in a process of its own: requests in, times out, a JSON line each.

usage: scripts/bench_runners.py {caravan BUNDLE | genai MODEL} THREADS

A request is {"prompts": lists of token ids of one length, "max_tokens": N}. The answer has
"prefill_s" (until every sequence has its first token), "decode_s" (for the N - 1 that follow) and
"token_ids" of every completion. End tokens are ignored. What must be set up for a batch of that
size is set up before the clock starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Prompts = list[list[int]]
Runner = Callable[[Prompts, int], dict[str, Any]]


def caravan(bundle: str, threads: int) -> Runner:
    """Caravan, one stream a prompt, as a service would read them."""
    from llama_runtime import LLM, SamplingParams

    loaded: list[LLM] = []

    def run(prompts: Prompts, max_tokens: int) -> dict[str, Any]:
        max_len = len(prompts[0]) + max_tokens
        if not loaded or (loaded[0].max_batch, loaded[0].max_len) != (len(prompts), max_len):
            for llm in loaded:
                llm.close()
            loaded[:] = [LLM(bundle, max_batch=len(prompts), max_len=max_len, threads=threads)]
            loaded[0].warm_up()
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        started = time.perf_counter()
        streams = [loaded[0].stream(prompt, params) for prompt in prompts]
        events = [[next(stream)] for stream in streams]
        prefilled = time.perf_counter()
        for _ in range(max_tokens - 1):
            for stream, seen in zip(streams, events, strict=True):
                seen.append(next(stream))
        ended = time.perf_counter()
        return {
            "prefill_s": prefilled - started,
            "decode_s": ended - prefilled,
            "token_ids": [[event.token_id for event in seen] for seen in events],
        }

    return run


def genai(model: str, threads: int) -> Runner:
    """ONNX Runtime GenAI, one generator for the batch."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, while the library loads
    import onnxruntime_genai as og

    config = og.Config(model)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    loaded = og.Model(config)

    def run(prompts: Prompts, max_tokens: int) -> dict[str, Any]:
        length = len(prompts[0]) + max_tokens
        params = og.GeneratorParams(loaded)
        # min_length keeps it from ending at an end token
        params.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
        )
        generator = og.Generator(loaded, params)
        started = time.perf_counter()
        generator.append_tokens(prompts)
        generator.generate_next_token()
        prefilled = time.perf_counter()
        for _ in range(max_tokens - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        sequences = [generator.get_sequence(i).tolist() for i in range(len(prompts))]
        return {
            "prefill_s": prefilled - started,
            "decode_s": ended - prefilled,
            "token_ids": [sequence[len(prompts[0]) :] for sequence in sequences],
        }

    return run


def main() -> None:
    """Answer requests until standard input ends."""
    if len(sys.argv) != 4 or sys.argv[1] not in ("caravan", "genai"):
        sys.exit((__doc__ or "").split("\n\n")[1])
    run = (caravan if sys.argv[1] == "caravan" else genai)(sys.argv[2], int(sys.argv[3]))
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(run(request["prompts"], request["max_tokens"])), flush=True)


if __name__ == "__main__":
    main()
