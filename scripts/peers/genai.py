"""ONNX Runtime GenAI as a worker: a generator a batch, since its engine's batching needs CUDA.

    python -m scripts.peers.genai MODEL --threads N --slots N --max-len N

Batches are fixed, and made of requests for about as many tokens: a batch runs until its longest
row has ended.
"""

from __future__ import annotations

import json
import os

from scripts.peers.protocol import Loaded, Options, Output, fixed_batches, serve


def load(options: Options) -> Loaded:
    """Load the model and its tokenizer."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, while the library loads
    import numpy as np
    import numpy.typing as npt
    import onnxruntime_genai as og

    config = og.Config(str(options.model))
    session = {"intra_op_num_threads": options.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    tokenizer = og.Tokenizer(model)

    def batch(prompts: list[str], max_new_tokens: list[int]) -> tuple[list[str], int]:
        ids = np.asarray(tokenizer.encode_batch(prompts).as_numpy())  # padded to [B, longest]
        length = ids.shape[1] + max(max_new_tokens)
        params = og.GeneratorParams(model)
        # min_length keeps it from ending at an end token
        params.set_search_options(
            batch_size=len(prompts), max_length=length, min_length=length, do_sample=False
        )
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        rows = [
            generator.get_sequence(i)[ids.shape[1] :][:count]
            for i, count in enumerate(max_new_tokens)
        ]
        return [tokenizer.decode(row) for row in rows], sum(len(row) for row in rows)

    def generate(prompts: list[str], max_new_tokens: list[int]) -> Output:
        texts = [""] * len(prompts)
        output_tokens = 0
        for rows in fixed_batches(max_new_tokens, options.slots):
            found, count = batch([prompts[i] for i in rows], [max_new_tokens[i] for i in rows])
            output_tokens += count
            for i, text in zip(rows, found, strict=True):
                texts[i] = text
        return Output(texts, output_tokens)

    def count(text: str) -> int:
        return len(tokenizer.encode(text))

    def logits(tokens: list[int]) -> npt.NDArray[np.float32]:
        params = og.GeneratorParams(model)
        params.set_search_options(batch_size=1, max_length=len(tokens) + 1, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array([tokens], np.int32))
        rows: npt.NDArray[np.float32] = generator.get_output("logits")[0]
        return rows

    return Loaded(generate, count, logits, {"batching": "fixed, by number of new tokens"})


if __name__ == "__main__":
    serve(load)
