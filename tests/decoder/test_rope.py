"""Rotary tables are transformers', to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_decoder.config import LlamaConfig, RopeScaling
from llama_decoder.rope import inverse_frequencies, rope_tables
from llama_decoder.tiny import tiny_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "default, another base": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        **LLAMA3,
        "original_max_position_embeddings": 64,
    },
}
SIZES = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
}


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_transformers(case: str, head_dim: int) -> None:
    config = {**SIZES, "head_dim": head_dim, "rope_parameters": CASES[case]}
    ours = LlamaConfig.from_huggingface(config)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**config))
    assert torch.equal(inverse_frequencies(ours), theirs.inv_freq)

    rows = 1024
    cos, sin = rope_tables(ours, rows)
    assert cos.shape == sin.shape == (rows, head_dim // 2)
    assert cos.dtype == sin.dtype == torch.float32
    their_cos, their_sin = theirs(torch.zeros(()), torch.arange(rows)[None])
    # Vectorised cosines may differ in the last bit from one memory layout to another.
    torch.testing.assert_close(cos, their_cos[0, :, : head_dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, their_sin[0, :, : head_dim // 2], rtol=0, atol=1e-6)


def test_the_cases_are_all_different() -> None:
    tables = [
        inverse_frequencies(LlamaConfig.from_huggingface({**SIZES, "rope_parameters": rope}))
        for rope in CASES.values()
    ]
    for i, table in enumerate(tables):
        assert not any(torch.equal(table, other) for other in tables[:i])


def test_llama_cpp_factors_are_llama3_scaling() -> None:
    """llama.cpp writes the scaling as divisors, by the formula that its converter has."""
    base, old_length = 500000.0, 64
    low_wavelength = old_length / LLAMA3["low_freq_factor"]
    high_wavelength = old_length / LLAMA3["high_freq_factor"]
    factors = []
    for d in range(0, 32, 2):
        wavelength = 2 * math.pi * base ** (d / 32)
        if wavelength < high_wavelength:
            factors.append(1.0)
        elif wavelength > low_wavelength:
            factors.append(LLAMA3["factor"])
        else:
            smooth = (old_length / wavelength - 1.0) / (4.0 - 1.0)
            factors.append(1 / ((1 - smooth) / LLAMA3["factor"] + smooth))
    assert len(set(factors)) > 2, "the case must have a frequency between the two bounds"
    scaling = RopeScaling(kind="llama3", **LLAMA3, original_max_positions=old_length)
    torch.testing.assert_close(
        inverse_frequencies(tiny_config(rope_theta=base, rope_factors=tuple(factors))),
        inverse_frequencies(tiny_config(rope_theta=base, rope_scaling=scaling)),
        rtol=1e-6,
        atol=0,
    )


def test_factors_and_linear_scaling_both_count() -> None:
    plain = inverse_frequencies(tiny_config())
    linear = RopeScaling(kind="linear", factor=2.0)
    scaled = inverse_frequencies(tiny_config(rope_factors=(4.0,) * 16, rope_scaling=linear))
    assert torch.equal(scaled, plain / 8)
