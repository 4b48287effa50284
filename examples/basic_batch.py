"""A few questions at once.

    python examples/basic_batch.py bundle

Each has its own length, and its own parameters if it wants; answers come back in order.
"""

from __future__ import annotations

import sys
import textwrap

from llama_runtime import LLM, CaravanError, SamplingParams

QUESTIONS = [
    "What is the capital of Peru?",
    "Write a haiku about a caravan of llamas.",
    "Explain in one sentence what a compiler does.",
    "Is water wet?",
]
PARAMS = [
    SamplingParams(max_tokens=24),
    SamplingParams(max_tokens=48, temperature=0.8, top_p=0.95, seed=1),
    SamplingParams(max_tokens=48, stop=(".",)),
    SamplingParams(max_tokens=8, choice=("yes", "no")),
]


def main(bundle: str = "bundle") -> None:
    """Ask, and show what came back."""
    with LLM(bundle, max_batch=len(QUESTIONS), max_len=256) as llm:
        if llm.has_chat_template:
            completions = llm.chat([[{"role": "user", "content": q}] for q in QUESTIONS], PARAMS)
        else:
            completions = llm.generate(QUESTIONS, PARAMS)
    for question, completion in zip(QUESTIONS, completions, strict=True):
        print(f"{question}  [{len(completion.token_ids)} tokens, {completion.finish_reason}]")
        print(textwrap.indent(textwrap.fill(completion.text.strip(), 88), "    "), end="\n\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except CaravanError as error:
        sys.exit(f"error: {error}")
