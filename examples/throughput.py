"""What a batch gains: the same prompts one by one, and together.

    python examples/throughput.py bundle

Both give the same tokens, which is checked. ``llama-run bench`` measures with more care.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from llama_runtime import LLM, CaravanError, Completion, SamplingParams

COUNT = 10
PROMPTS = [f"The {number}th thing to know about llamas is" for number in range(1, COUNT + 1)]
PARAMS = SamplingParams(max_tokens=50, ignore_eos=True)


def timed(name: str, work: Callable[[], list[Completion]]) -> tuple[list[Completion], float]:
    """Run it, and print a line of the table."""
    start = time.perf_counter()
    completions = work()
    seconds = time.perf_counter() - start
    tokens = sum(len(completion.token_ids) for completion in completions)
    print(f"{name:12} {seconds:7.2f} s  {tokens / seconds:9,.1f} tokens/s")
    return completions, seconds


def main(bundle: str = "bundle") -> None:
    """Both ways, without what one leaves behind for the other."""
    with LLM(bundle, max_batch=COUNT, max_len=128, prefix_tokens=0) as llm:
        llm.warm_up()
        print(f"{COUNT} prompts, {PARAMS.max_tokens} tokens each, {llm.bundle.manifest.name}")
        alone, long = timed(
            "one by one", lambda: [llm.generate(prompt, PARAMS)[0] for prompt in PROMPTS]
        )
        together, short = timed("together", lambda: llm.generate(PROMPTS, PARAMS))
    same = sum(one.token_ids == two.token_ids for one, two in zip(alone, together, strict=True))
    print(f"{long / short:.1f} times as fast; {same} of {COUNT} completions are the same")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except CaravanError as error:
        sys.exit(f"error: {error}")
