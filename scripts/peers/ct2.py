"""CTranslate2 as a worker: ``Generator.generate_batch``, in batches of like prompts.

    python -m scripts.peers.ct2 MODEL --threads N --slots N --max-len N

It has no batching of its own that refills a batch. Prompts of one batch are read together up to
the length of the shortest, so those of like length go together; a row leaves the batch where it
ends. It takes and gives tokens, so ``tokenizers`` does the text.
"""

from __future__ import annotations

from typing import Any

from scripts.peers.protocol import Loaded, Options, Output, fixed_batches, serve


def load(options: Options) -> Loaded:
    """Load the model and the tokenizer that lies beside it."""
    import ctranslate2
    import numpy as np
    import numpy.typing as npt
    from tokenizers import Tokenizer

    generator = ctranslate2.Generator(
        str(options.model),
        device="cpu",
        compute_type="int8",
        inter_threads=1,
        intra_threads=options.threads,
    )
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))

    def batch(tokens: list[list[str]], max_new_tokens: list[int]) -> list[list[int]]:
        longest, shortest_prompt = max(max_new_tokens), min(len(row) for row in tokens)
        settings: dict[str, Any] = {}
        if min(max_new_tokens) < longest:  # else nothing is called at every token
            # Steps count from the end of the shortest prompt
            last = [
                len(row) - shortest_prompt + count - 1
                for row, count in zip(tokens, max_new_tokens, strict=True)
            ]

            def ends(step: Any) -> bool:
                return bool(step.step >= last[step.batch_id])

            settings["callback"] = ends
        # min_length keeps rows from ending at an end token
        results = generator.generate_batch(
            tokens,
            max_batch_size=0,
            beam_size=1,
            sampling_topk=1,
            max_length=longest,
            min_length=longest,
            include_prompt_in_result=False,
            **settings,
        )
        return [result.sequences_ids[0] for result in results]

    def generate(prompts: list[str], max_new_tokens: list[int]) -> Output:
        tokens = [encoding.tokens for encoding in tokenizer.encode_batch(prompts)]
        ids: list[list[int]] = [[] for _ in prompts]
        for rows in fixed_batches([len(row) for row in tokens], options.slots):
            found = batch([tokens[i] for i in rows], [max_new_tokens[i] for i in rows])
            for i, row in zip(rows, found, strict=True):
                ids[i] = row[: max_new_tokens[i]]
        texts = tokenizer.decode_batch(ids, skip_special_tokens=False)
        return Output(texts, sum(len(row) for row in ids))

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    def logits(tokens: list[int]) -> npt.NDArray[np.float32]:
        found = generator.forward_batch([tokens], return_log_probs=False)
        rows: npt.NDArray[np.float32] = np.array(found.to(ctranslate2.DataType.float32))[0]
        return rows

    settings = {"compute_type": generator.compute_type, "batching": "fixed, by length of prompt"}
    return Loaded(generate, count, logits, settings)


if __name__ == "__main__":
    serve(load)
