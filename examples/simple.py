"""Batches without a model to fetch: a tiny Llama of random weights is made, built and run.

    pip install 'llama-caravan[export]'
    python examples/simple.py

What it writes is nonsense, since nobody taught it anything; that it writes the same alone and in
company is the point. The other examples take a bundle: build one of a real model.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_decoder.tiny import tiny_config, write_huggingface
from llama_export.build import build_bundle
from llama_runtime import LLM, CaravanError, SamplingParams

ENDS = ("<unk>", "<s>", "</s>")
PROMPTS = [
    "Hi",
    "What is the capital of Peru?",
    "Tell me, in as many words as you like, what happens when llamas meet a compiler.",
]


def make_checkpoint(folder: Path) -> None:
    """A Hugging Face directory of 140,000 random weights, and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*ENDS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(ENDS))
    tokenizer.save(str(folder / "tokenizer.json"))
    write_huggingface(tiny_config(vocab_size=len(vocabulary)), folder, seed=0)


def main() -> None:
    """Build, run a batch, and run its rows one by one."""
    with tempfile.TemporaryDirectory() as place:
        checkpoint, bundle = Path(place, "checkpoint"), Path(place, "bundle")
        checkpoint.mkdir()
        make_checkpoint(checkpoint)
        manifest = build_bundle(checkpoint, bundle)
        off = manifest.verification["max_logit_difference"]
        print(f"built and verified: logits are off by {off:.1e} at most")

        params = SamplingParams(max_tokens=40, temperature=0.7, seed=1, ignore_eos=True)
        with LLM(bundle, max_len=160) as llm:
            llm.warm_up()
            start = time.perf_counter()
            together = llm.generate(PROMPTS, params)
            middle = time.perf_counter()
            alone = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
            end = time.perf_counter()

    for completion in together:
        print(f"{completion.num_prompt_tokens:3} prompt tokens -> {completion.text!r}")
    same = [one.token_ids == two.token_ids for one, two in zip(together, alone, strict=True)]
    print(f"together {middle - start:.3f} s, one by one {end - middle:.3f} s; same tokens: {same}")


if __name__ == "__main__":
    try:
        main()
    except CaravanError as error:
        sys.exit(f"error: {error}")
