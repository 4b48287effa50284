"""Many requests of all kinds, as fast as they go.

    python examples/stress.py bundle 500

Requests are made while others run, so there may be any number of them. How many run at once is
found by what steps take. A request that is wrong says so, and the others go on.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Iterator

from llama_runtime import LLM, CaravanError, Request, SamplingParams

SYSTEM = "You are a patient guide who knows llamas. Answer the question that follows. "
MAX_LEN = 256


def requests(count: int) -> Iterator[Request]:
    """Long and short, greedy and drawn, some that can't be, and a beginning that all share."""
    rng = random.Random(0)
    for number in range(count):
        words = "why " * rng.choice([1, 4, 16, 30])
        kind = rng.choice(["greedy", "greedy", "drawn", "choice"])
        too_long = number % 50 == 7
        params = SamplingParams(
            max_tokens=MAX_LEN if too_long else rng.randint(2, 24),
            temperature=0.9 if kind == "drawn" else 0.0,
            choice=("yes", "no", "perhaps") if kind == "choice" else None,
        )
        yield Request(f"{SYSTEM}{words}{number}?", params)


def main(bundle: str = "bundle", count: str = "200") -> None:
    """Run them all, and account for each."""
    reasons: Counter[str] = Counter()
    start = time.perf_counter()
    with LLM(bundle, max_batch="auto", max_len=MAX_LEN) as llm:
        for done, (_, completion) in enumerate(llm.run(requests(int(count))), 1):
            reasons[completion.finish_reason] += 1
            if done % 50 == 0:
                now = llm.stats()
                print(f"{done:6} done, {now.running:3} running, {now.waiting:3} waiting")
        seconds, stats = time.perf_counter() - start, llm.stats()
    print(f"{reasons.total()} of {count} accounted for: {dict(sorted(reasons.items()))}")
    print(
        f"{seconds:.1f} s, {stats.completion_tokens / seconds:,.0f} tokens/s out; of "
        f"{stats.prompt_tokens:,} prompt tokens {stats.reused_tokens:,} had been computed before"
    )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except CaravanError as error:
        sys.exit(f"error: {error}")
