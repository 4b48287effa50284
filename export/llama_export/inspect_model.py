"""What a checkpoint is, for people."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.weights import parameter_shapes
from llama_export.sources import read_tokenizer
from llama_export.weight_file import float32_layout, weight_bytes


def describe_model(path: Path) -> Iterator[tuple[str, str]]:
    """Names and values, after checking all that a build checks before it reads weights.

    Raises:
        CheckpointError: the checkpoint can't be used.
        ExportError: its tokenizer can't.
    """
    checkpoint = open_checkpoint(path)
    tokenizer = read_tokenizer(checkpoint)
    config = checkpoint.config
    shapes = parameter_shapes(config)
    scaling = config.rope_scaling
    yield "name", checkpoint.name
    yield "format", f"{checkpoint.source_format} ({path})"
    yield "licence", checkpoint.licence or "not stated"
    yield "parameters", f"{sum(map(prod, shapes.values())):,}"
    yield "bundle in fp32", f"{weight_bytes(float32_layout(shapes)) / 1e6:,.0f} MB"
    yield "layers", str(config.num_layers)
    yield "hidden size", f"{config.hidden_size:,} (MLP {config.intermediate_size:,})"
    yield "heads", f"{config.num_heads}, {config.num_kv_heads} for keys and values"
    yield "head dimension", str(config.head_dim)
    yield "vocabulary", f"{config.vocab_size:,}{' (tied)' if config.tie_embeddings else ''}"
    yield "longest sequence", f"{config.max_positions:,} tokens"
    yield "RoPE", f"theta {config.rope_theta:g}{f', {scaling.kind} scaling' if scaling else ''}"
    yield "end tokens", str(tokenizer.generation_config.get("eos_token_id"))
    yield "chat template", "yes" if tokenizer.chat_template else "no"
