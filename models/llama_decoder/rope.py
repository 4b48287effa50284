"""Rotary position embedding: the angles by which pairs of query and key values are turned.

The arithmetic is transformers' (``modeling_rope_utils.py`` and ``modeling_llama.py``), in float32
and in the same order, so the tables are the same numbers.
"""

from __future__ import annotations

import math

import torch

from llama_decoder.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Radians per position of each pair of a head's values.

    Args:
        config: gives D, the base, and what stretches the frequencies.

    Returns:
        float32 [D/2], falling.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies: torch.Tensor = 1.0 / (config.rope_theta**exponents)
    if config.rope_factors is not None:
        frequencies = frequencies / torch.tensor(config.rope_factors, dtype=torch.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    return _scale_as_llama3(frequencies, scaling)


def rope_tables(config: LlamaConfig, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of every angle of the first ``rows`` positions.

    Args:
        config: gives the frequencies.
        rows: positions, from 0; C plus what padding may reach past it.

    Returns:
        cos and sin, each float32 [rows, D/2].
    """
    positions = torch.arange(rows, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(config)
    return angles.cos(), angles.sin()


def _scale_as_llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Divides low frequencies, keeps high ones, and passes smoothly between them."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    positions = scaling.original_max_positions
    # A llama3 RopeScaling can't be made without them; this is for the type checker.
    assert low is not None
    assert high is not None
    assert positions is not None
    wavelengths = 2 * math.pi / frequencies
    is_low = wavelengths > positions / low
    is_high = wavelengths < positions / high
    share = (positions / wavelengths - low) / (high - low)
    between = (1 - share) * frequencies / scaling.factor + share * frequencies
    scaled = torch.where(is_low, frequencies / scaling.factor, frequencies)
    return torch.where(is_low | is_high, scaled, between)
