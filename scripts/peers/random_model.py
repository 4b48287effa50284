"""A published shape with random weights, as others read it: a Hugging Face directory, a GGUF.

    python -m scripts.peers.random_model SHAPE TOKENIZER_DIRECTORY TOKENIZER.gguf OUTPUT

OUTPUT gets ``hf`` and ``f16.gguf``. The tokenizer is a real one, since not every peer takes the
one of bundles with random weights, which has no merges; tokens that it lacks are made up.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from llama_decoder.config import LlamaConfig
from llama_decoder.shapes import SHAPES


def main() -> None:
    """Write both."""
    shape, tokenizer, gguf, output = sys.argv[1], *map(Path, sys.argv[2:])
    model = random_llama(SHAPES[shape])
    output.mkdir(parents=True, exist_ok=True)
    write_gguf(model, SHAPES[shape], gguf, output / "f16.gguf")
    unfinished = output / "unfinished-hf"
    model.save_pretrained(unfinished)
    write_tokenizer(tokenizer, SHAPES[shape].vocab_size, unfinished)
    unfinished.rename(output / "hf")  # last: whoever finds it needn't make either again


def random_llama(c: LlamaConfig) -> Any:
    """A model of the shape as transformers has it, with its initial weights, in bf16.

    Positions aren't stretched: the prompts are short, and nothing is slower for it.
    """
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=8192,  # some peers make tables of that length
        tie_word_embeddings=c.tie_embeddings,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def made_up(first: int, vocab_size: int) -> list[str]:
    """Tokens for the ids that a tokenizer lacks; nothing encodes to them."""
    return [f"<|filler_{i}|>" for i in range(first, vocab_size)]


def write_tokenizer(source: Path, vocab_size: int, output: Path) -> None:
    """A directory's tokenizer with so many tokens."""
    parsed = json.loads((source / "tokenizer.json").read_text())
    vocabulary = parsed["model"]["vocab"]
    first = 1 + max([*vocabulary.values(), *(token["id"] for token in parsed["added_tokens"])])
    vocabulary.update({token: first + i for i, token in enumerate(made_up(first, vocab_size))})
    (output / "tokenizer.json").write_text(json.dumps(parsed, ensure_ascii=False))
    shutil.copy(source / "tokenizer_config.json", output)


def write_gguf(model: Any, c: LlamaConfig, tokenizer: Path, output: Path) -> None:
    """The model in fp16, with the tokenizer of another file.

    Rows of query and key stand in the order of GGUF only for a model that was converted; of random
    numbers any order is as good.
    """
    import gguf
    import torch

    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_heads)
    writer.add_head_count_kv(c.num_kv_heads)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    fields = gguf.GGUFReader(tokenizer).fields
    for name, add in (
        ("model", writer.add_tokenizer_model),
        ("pre", writer.add_tokenizer_pre),
        ("merges", writer.add_token_merges),
    ):
        add(fields[f"tokenizer.ggml.{name}"].contents())
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    extra = made_up(len(tokens), c.vocab_size)
    writer.add_token_list([*tokens, *extra])
    writer.add_token_types([*kinds, *[int(gguf.TokenType.NORMAL)] * len(extra)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_embeddings:
            continue
        kind = torch.float32 if value.ndim == 1 else torch.float16  # norms stay whole
        known = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(known, value.to(kind).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
