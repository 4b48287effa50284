"""Turning is orthogonal and spreads what is large over all channels."""

from __future__ import annotations

import pytest
import torch

from llama_decoder.tiny import tiny_config
from llama_export.quantise.rotation import (
    NORM_LIMIT,
    NORM_STEP,
    Rotation,
    hadamard,
    inner_block,
    turn_blocks,
)

SIZES = (64, 96, 256, 576, 7, 8192)


@pytest.mark.parametrize("size", SIZES)
def test_lengths_and_angles_stay(size: int) -> None:
    rotation = Rotation(tiny_config(hidden_size=size))
    rows = torch.randn(20, size, generator=torch.Generator().manual_seed(0))
    turned = rotation.table(rows)
    torch.testing.assert_close(turned @ turned.T, rows @ rows.T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_one_large_channel_is_spread_over_all(size: int) -> None:
    rotation = Rotation(tiny_config(hidden_size=size))
    channels = torch.eye(size)[:: max(1, size // 16)]
    turned = rotation.table(channels).abs()
    # Even, where there is a Hadamard matrix; a cosine is the square root of 2 larger at most.
    assert turned.max() <= (2 / size) ** 0.5 * 1.001
    assert ((turned > 1e-3 / size**0.5).float().mean(1) > 0.8).all()


def test_the_head_s_matrix_stands_for_the_norm_s_weight() -> None:
    config = tiny_config(hidden_size=96)
    rotation, generator = Rotation(config), torch.Generator().manual_seed(0)
    norm = torch.randn(96, generator=generator)
    norm[3] = 0  # which nothing could be divided by
    rows, table = torch.randn(2, 20, 96, generator=generator)
    got = rotation.table(rows) @ rotation.head(norm) @ rotation.table(table).T
    torch.testing.assert_close(got, (rows * norm) @ table.T, rtol=1e-4, atol=1e-4)


def test_blocks_turned_twice_are_as_before() -> None:
    for columns, block in ((1536, 64), (256, 64), (40, 8), (7, 1)):
        assert inner_block(columns) == block
        rows = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(0))
        turned = turn_blocks(rows)
        assert turned.shape == rows.shape
        assert torch.equal(turned, rows) == (block == 1)
        torch.testing.assert_close(turn_blocks(turned), rows, rtol=1e-5, atol=1e-5)
        # A block's numbers go nowhere else.
        rows[..., block:] = 0
        assert not turn_blocks(rows)[..., block:].any()


def test_hadamard_matrices_have_one_magnitude() -> None:
    for size in (1, 2, 64):
        matrix = hadamard(size)
        torch.testing.assert_close(matrix @ matrix, torch.eye(size))
        torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


def test_a_norm_s_rows_have_the_steps_that_are_best_for_normal_values() -> None:
    rows = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))

    def error(limit: float) -> float:
        step = limit / 127
        return float(((rows / step).round().clamp(-128, 127) * step - rows).square().mean())

    assert NORM_STEP == NORM_LIMIT / 127
    assert error(NORM_LIMIT) < min(error(NORM_LIMIT - 0.3), error(NORM_LIMIT + 0.3))
