"""What a worker and the benchmark say to each other: a JSON object a line.

A worker loads its model, says what it set in one line, and then answers requests until its
standard input ends. A request is {"prompts": texts, "max_new_tokens": one number a prompt}; the
answer {"seconds", "output_tokens", "texts"}, or {"error"}. The clock runs over the whole call:
text in, text out. End tokens are ignored, so that all workers make as many tokens. A request
{"count": texts} is answered by {"counts"}: the tokens that the worker makes of each text. A request
{"tokens": ids, "output": path} asks what the model predicts after each of them, from an empty
cache on: the logits go into that file, as float32 [T, V] and nothing else, and {"shape"} back.

Only the standard library is imported here: this runs in every peer's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """What every worker is told.

    Attributes:
        model: the model, in the peer's own format.
        threads: how many threads compute.
        slots: the most sequences at once.
        max_len: the most tokens of a sequence, prompt and completion.
    """

    model: Path
    threads: int
    slots: int
    max_len: int


@dataclass(frozen=True)
class Output:
    """The completions of one call, in order.

    Attributes:
        texts: one a prompt.
        output_tokens: how many tokens they are, together. What a row made beyond what was asked of
            it is cut off and doesn't count.
    """

    texts: list[str]
    output_tokens: int


Generate = Callable[[list[str], list[int]], Output]
Logits = Callable[[list[int]], Any]


@dataclass(frozen=True)
class Loaded:
    """A peer that is ready.

    Attributes:
        generate: continues prompts, each by as many tokens as asked.
        count: how many tokens a prompt is.
        logits: what the model predicts after each of some tokens, from an empty cache on: a numpy
            array [T, V] of float32. None where the peer doesn't say.
        settings: what was set, for the report.
    """

    generate: Generate
    count: Callable[[str], int]
    logits: Logits | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def serve(load: Callable[[Options], Loaded]) -> None:
    """Be a worker: options from the command line, requests from standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    for name in ("--threads", "--slots", "--max-len"):
        parser.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded = load(Options(given.model, given.threads, given.slots, given.max_len))
    print(json.dumps({"settings": loaded.settings}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(loaded, json.loads(line))), file=answers, flush=True)


def answer(loaded: Loaded, request: dict[str, Any]) -> dict[str, Any]:
    """One request's answer; what went wrong is an answer too."""
    try:
        if "count" in request:
            return {"counts": [loaded.count(text) for text in request["count"]]}
        if "tokens" in request:
            return {"shape": _write_logits(loaded, request["tokens"], request["output"])}
        started = time.perf_counter()
        output = loaded.generate(request["prompts"], request["max_new_tokens"])
        seconds = time.perf_counter() - started
    except Exception as error:  # a peer may raise anything, and the others go on
        return {"error": f"{type(error).__name__}: {error}"}
    return {"seconds": seconds, "output_tokens": output.output_tokens, "texts": output.texts}


def _write_logits(loaded: Loaded, tokens: list[int], output: str) -> list[int]:
    if loaded.logits is None:
        raise ValueError("it gives no logits")
    found = loaded.logits(tokens)
    if str(found.dtype) != "float32":
        raise ValueError(f"its logits are {found.dtype}, not float32")
    found.tofile(output)
    return list(found.shape)


def fixed_batches(lengths: list[int], size: int) -> list[list[int]]:
    """Indices in batches for a peer that has no batching of its own: like lengths together.

    Args:
        lengths: what rows of one batch should have in common.
        size: the most rows of a batch.

    Returns:
        Every index once; the longest first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]
