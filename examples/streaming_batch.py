"""Several streams at once, each piece shown as it comes.

    python examples/streaming_batch.py bundle

The number before a piece is its stream's: they take turns, because every step moves all of them.
"""

from __future__ import annotations

import asyncio
import sys
import time

from llama_runtime import AsyncLLM, CaravanError, SamplingParams

PROMPTS = ["Once upon a time", "The three laws of robotics are", "Dear llama,"]
PARAMS = SamplingParams(max_tokens=20, temperature=0.7, seed=3, ignore_eos=True)


async def follow(llm: AsyncLLM, number: int, prompt: str) -> tuple[str, float, float]:
    """Show a stream; its text, and the seconds to its first and to its last token."""
    start, first, text = time.perf_counter(), 0.0, ""
    async with llm.stream(prompt, PARAMS, timeout=60) as stream:
        async for event in stream:
            first = first or time.perf_counter() - start
            text += event.text
            print(f"{number}:{event.text!r}", end=" ", flush=True)
    return text, first, time.perf_counter() - start


async def main(bundle: str = "bundle") -> None:
    """Follow all of them, then show each as a whole."""
    async with await AsyncLLM.load(bundle, max_batch=len(PROMPTS), max_len=128) as llm:
        found = await asyncio.gather(*(follow(llm, *pair) for pair in enumerate(PROMPTS)))
    print("\n")
    for prompt, (text, first, last) in zip(PROMPTS, found, strict=True):
        print(f"first token {first * 1e3:4.0f} ms, all {last * 1e3:5.0f} ms: {prompt + text!r}")


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:2]))
    except CaravanError as error:
        sys.exit(f"error: {error}")
