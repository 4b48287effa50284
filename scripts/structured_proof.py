"""JSON schemas are kept to: under random tokens, by a real model, and whatever the schema.

1. For each schema of the corpus, texts drawn at random under its masks: all that are complete are
   valid, by jsonschema's verdict.
2. Each hostile schema in a process of its own: it is taken or refused, in bounded time and memory.
3. The real model fills in each schema at two temperatures, in a batch whose other half is free: all
   answers that end by themselves are valid, and the free ones have the tokens they have alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from llama_runtime.bundle import open_bundle
from llama_runtime.errors import RequestError
from llama_runtime.generation_config import eos_token_ids
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams
from tests.hostile.measured import measured
from tests.structured.answers import ask
from tests.structured.hostile import HOSTILE
from tests.structured.schemas import SCHEMAS
from tests.structured.walks import Walker, complaint

DRAWN_TOKENS = 600
TEMPERATURES = (0.0, 0.8)
MAX_LEN = 512
MOST_SECONDS = 5.0  # of compiling a hostile schema, on a machine that does nothing else
MOST_TOKEN_SECONDS = 1.0
MOST_BYTES = 2**30


def compile_times(walker: Walker) -> dict[str, Any]:
    """How long schemas take to compile, in milliseconds."""
    walker.compiler.prepare(SamplingParams(json_schema=True).constraint)  # reads the vocabulary
    times = []
    for schema in SCHEMAS.values():
        started = time.perf_counter()
        walker.compiler.prepare(SamplingParams(json_schema=schema).constraint)
        times.append(1e3 * (time.perf_counter() - started))
    return {"median_ms": round(statistics.median(times), 2), "max_ms": round(max(times), 1)}


def draw(walker: Walker, seeds: int) -> dict[str, Any]:
    """Texts of every schema, judged."""
    found: dict[str, Any] = {"drawn": 0, "finished": 0, "tokens": 0, "complaints": []}
    never = set(SCHEMAS)
    for name, schema in SCHEMAS.items():
        for seed in range(seeds):
            try:
                walk = walker.walk(schema, seed, DRAWN_TOKENS)
            except RequestError as error:
                found["complaints"].append(f"{name}, seed {seed}: {error}")
                continue
            found["drawn"] += 1
            found["tokens"] += walk.num_tokens
            if walk.finished:
                found["finished"] += 1
                never.discard(name)
                wrong = complaint(schema, walk.text)
                if wrong is not None:
                    found["complaints"].append(f"{name}, seed {seed}: {wrong}: {walk.text}")
    return found | {"never_finished": sorted(never)}


def attack(tokenizer: Path) -> dict[str, Any]:
    """Each hostile schema, measured."""
    found: dict[str, Any] = {"cases": 0, "refused": 0, "complaints": []}
    print(f"\n{'compile':>8}  {'token':>7}  {'memory':>8}  hostile schema")
    for name in HOSTILE:
        program = [sys.executable, "-m", "tests.structured.compile_hostile"]
        run = measured([*program, str(tokenizer), name], limit_s=30)
        case = json.loads(run.out) if run.status == 0 else {}
        compile_s, token_s = case.get("compile_s", run.seconds), case.get("token_s", 0.0)
        outcome = case.get("outcome", f"exit status {run.status}")
        print(
            f"{compile_s:>7.2f}s  {token_s:>6.3f}s  {run.peak_bytes >> 20:>5} MB  {name}: "
            f"{outcome[:100]}",
            flush=True,
        )
        found["cases"] += 1
        found["refused"] += outcome.startswith("refused")
        if (
            run.status
            or compile_s > MOST_SECONDS
            or token_s > MOST_TOKEN_SECONDS
            or run.peak_bytes > MOST_BYTES
        ):
            found["complaints"].append(f"{name}: {compile_s:.1f} s, {outcome}")
    return found


def main() -> None:
    """Draw, attack, ask, and say what was found."""
    parser = argparse.ArgumentParser(prog="scripts/prove_structured", description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--schemas", type=int, default=1)
    given = parser.parse_args()
    started = time.monotonic()
    bundle = open_bundle(given.bundle, verify="size")
    with LLM(given.bundle, max_batch=given.max_batch, max_len=MAX_LEN) as llm:
        vocab_size = bundle.manifest.geometry.vocab_size
        walker = Walker(
            bundle.tokenizer_path, vocab_size, min(eos_token_ids(bundle.generation_config))
        )
        figures: dict[str, Any] = {"schemas": len(SCHEMAS), "compile": compile_times(walker)}
        print(f"{len(SCHEMAS)} schemas, compiled in {figures['compile']}", flush=True)
        figures["drawn"] = draw(walker, given.seeds)
        drawn = figures["drawn"]
        print(f"{drawn['drawn']} texts, {drawn['finished']} complete, {drawn['tokens']} tokens")
        figures["hostile"] = attack(bundle.tokenizer_path)
        schemas = dict(list(SCHEMAS.items())[:: given.schemas])
        before = time.monotonic()
        answers = ask(llm, schemas, TEMPERATURES, given.max_tokens)
    figures["model"] = {
        "asked": len(schemas) * len(TEMPERATURES),
        "finished": answers.finished,
        "cut_off": answers.cut_off,
        "seconds": round(time.monotonic() - before, 1),
        "complaints": answers.complaints,
    }
    print(
        f"\n{figures['model']['asked']} answers, {answers.finished} ended by themselves, "
        f"{answers.cut_off} were cut off, in {figures['model']['seconds']} s"
    )
    complaints = [c for part in ("drawn", "hostile", "model") for c in figures[part]["complaints"]]
    figures["seconds"] = round(time.monotonic() - started, 1)
    print(*complaints, sep="\n", end="\n" if complaints else "")
    print(json.dumps(figures))
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
