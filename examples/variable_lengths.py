"""Prompts of very different lengths in one batch: who ends early makes room at once.

    python examples/variable_lengths.py bundle

Twelve requests share four slots. They are printed as they end, so that the order shows: a short
one that came late overtakes a long one that came early, and nothing is padded.
"""

from __future__ import annotations

import sys
import time

from llama_runtime import LLM, CaravanError, Request, SamplingParams

SLOTS = 4
WORDS = (60, 2, 15, 1, 30, 4, 8, 45, 1, 20, 3, 10)  # of each prompt
TOKENS = (40, 4, 12, 30, 6, 24, 8, 16, 2, 20, 10, 4)  # of each completion


def main(bundle: str = "bundle") -> None:
    """Run them, and draw a bar for each: prompt tokens, then completion tokens."""
    requests = [
        Request("llama " * words, SamplingParams(max_tokens=tokens, ignore_eos=True))
        for words, tokens in zip(WORDS, TOKENS, strict=True)
    ]
    with LLM(bundle, max_batch=SLOTS, max_len=512) as llm:
        llm.warm_up()
        start = time.perf_counter()
        print(f"{len(requests)} requests, {SLOTS} slots; . prompt, # completion, of 4 tokens each")
        for index, completion in llm.run(requests):
            prompt, made = completion.num_prompt_tokens, len(completion.token_ids)
            bar = "." * -(-prompt // 4) + "#" * -(-made // 4)
            print(f"{time.perf_counter() - start:6.2f} s  [{index:2}] {prompt:3} + {made:2}  {bar}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except CaravanError as error:
        sys.exit(f"error: {error}")
