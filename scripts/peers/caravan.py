"""Caravan as a worker: ``LLM.generate`` on a bundle.

python -m scripts.peers.caravan BUNDLE --threads N --slots N --max-len N
"""

from __future__ import annotations

from llama_runtime import LLM, SamplingParams
from scripts.peers.protocol import Loaded, Options, Output, serve


def load(options: Options) -> Loaded:
    """Open the bundle. No prefix is kept: rounds repeat no prompt, and no peer keeps any."""
    llm = LLM(
        options.model,
        max_batch=options.slots,
        max_len=options.max_len,
        threads=options.threads,
        prefix_tokens=0,
    )
    llm.warm_up()

    def generate(prompts: list[str], max_new_tokens: list[int]) -> Output:
        params = [
            SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            for count in max_new_tokens
        ]
        completions = llm.generate(prompts, params)
        return Output(
            texts=[completion.text for completion in completions],
            output_tokens=sum(len(completion.token_ids) for completion in completions),
        )

    def count(text: str) -> int:
        return len(llm.tokenizer.encode(text))

    return Loaded(generate, count, settings={"slots": llm.max_batch, "max_len": llm.max_len})


if __name__ == "__main__":
    serve(load)
