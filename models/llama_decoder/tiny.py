"""A Llama of 100,000 random weights: what tests, documentation and CI of every package use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llama_decoder.config import LlamaConfig, RopeScaling
from llama_decoder.errors import CheckpointError
from llama_decoder.safetensors_file import CONFIG, SINGLE
from llama_decoder.weights import Array, parameter_shapes, parameters

TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,  # not hidden_size / num_heads, so that nothing takes it for that
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    rope_factors=None,
    max_positions=256,
    tie_embeddings=False,
)


def tiny_config(**overrides: Any) -> LlamaConfig:
    """The tiny configuration with some attributes changed."""
    return replace(TINY, **overrides)


def random_weights(config: LlamaConfig, seed: int) -> dict[str, Array]:
    """Every parameter by name: norms near 1, matrices scaled so that activations keep their size.

    Args:
        config: any, small enough for memory.
        seed: the same seed gives the same weights.
    """
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        fan_in = np.float32(shape[-1])
        weights[name] = 1 + 0.1 * values if len(shape) == 1 else values / np.sqrt(fan_in)
    return weights


def write_huggingface(config: LlamaConfig, directory: Path, seed: int) -> None:
    """Writes ``config.json`` and ``model.safetensors`` with the random weights of ``seed``.

    Args:
        config: without ``rope_factors``, which only GGUF files have.
        directory: an existing one.
        seed: as of ``random_weights``.

    Raises:
        CheckpointError: the configuration has ``rope_factors``.
    """
    (directory / CONFIG).write_text(json.dumps(_huggingface_config(config), indent=2))
    weights = random_weights(config, seed)
    tensors: dict[str, Array] = {}
    for parameter in parameters(config, "safetensors"):
        ends = np.cumsum([part.shape[0] for part in parameter.parts])
        pieces = np.split(weights[parameter.name], ends[:-1])
        tensors.update((part.name, v) for part, v in zip(parameter.parts, pieces, strict=True))
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def _huggingface_config(config: LlamaConfig) -> dict[str, object]:
    if config.rope_factors is not None:
        raise CheckpointError("config.json can't say rope_factors; leave them out")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _huggingface_scaling(config.rope_scaling),
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


def _huggingface_scaling(scaling: RopeScaling | None) -> dict[str, object] | None:
    if scaling is None:
        return None
    values = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }
    return {key: value for key, value in values.items() if value is not None}
