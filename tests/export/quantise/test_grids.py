"""The chosen grid is the best of those tried, and holds what it must."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llama_export.quantise.grids import (
    PLAIN,
    SHRINKS_4,
    block_grid,
    channel_grid,
    nearest_blocks,
    nearest_channels,
)

ROWS = np.random.default_rng(0).standard_normal((40, 200)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
def test_no_value_is_further_than_half_a_step(bits: int, block: int) -> None:
    product = nearest_blocks(ROWS, bits, block, shrinks=PLAIN)
    steps = np.repeat(product.scales, block, axis=1)[:, :200]
    # The whole grid moves by up to half a step, so that 0 is one of its levels.
    assert (np.abs(product.dequantise() - ROWS) <= steps * 1.001).all()
    assert np.median(np.abs(product.dequantise() - ROWS) / steps) < 0.3


def test_rows_on_a_grid_are_kept() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (8, 4, 32))
    codes[..., :2] = [0, 15]
    zeros, scales = rng.integers(0, 16, (8, 4, 1)), 2.0 ** rng.integers(-6, 2, (8, 4, 1))
    rows = ((codes - zeros) * scales).reshape(8, 128).astype(np.float32)
    product = nearest_blocks(rows, 4, 32)
    np.testing.assert_allclose(product.dequantise(), rows, rtol=1e-6)
    np.testing.assert_array_equal(product.codes, codes.reshape(8, 128))


def test_values_on_one_side_have_their_zero_at_that_end() -> None:
    for values, zero in ((ROWS + 6, 0), (ROWS - 6, 15)):
        assert (nearest_blocks(values, 4, 32, shrinks=PLAIN).zero_points == zero).all()


@pytest.mark.parametrize("block", [32, 64])
def test_the_search_beats_the_widest_grid(block: int) -> None:
    def error(shrinks: tuple[float, ...]) -> np.ndarray:
        product = nearest_blocks(ROWS[:, :192], 4, block, shrinks=shrinks)
        off = (product.dequantise() - ROWS[:, :192]).reshape(40, -1, block)
        errors: np.ndarray = np.square(off).sum(2)
        return errors

    plain, searched = error(PLAIN), error(SHRINKS_4)
    assert (searched <= plain * 1.0001).all()
    assert searched.sum() < 0.95 * plain.sum()


def test_importance_decides_between_columns() -> None:
    values = torch.from_numpy(ROWS[:, :32])
    values[:, 0] = 9
    importance = torch.ones(32)

    def error_of_first(weight: float) -> float:
        importance[0] = weight
        grid = block_grid(values, importance, 4)
        return float((grid.values(grid.codes(values)) - values)[:, 0].abs().mean())

    assert error_of_first(1e-4) > 10 * error_of_first(1e4)


def test_signed_bytes_leave_out_the_lowest() -> None:
    product = nearest_channels(-np.abs(ROWS))
    assert product.codes.min() >= -127
    assert product.codes.dtype == np.int8
    assert (np.abs(product.dequantise() + np.abs(ROWS)) <= product.scales[:, None] * 20).all()
    plain = nearest_channels(ROWS, shrinks=PLAIN)
    assert (np.abs(plain.dequantise() - ROWS) <= plain.scales[:, None] * 0.5001).all()


def test_rows_of_zeros_stay_zeros() -> None:
    zeros = np.zeros((2, 64), np.float32)
    for product in (nearest_blocks(zeros, 4, 32), nearest_channels(zeros)):
        assert (product.scales > 0).all()
        np.testing.assert_array_equal(product.dequantise(), zeros)
    grid = channel_grid(torch.zeros(2, 8))
    assert grid.scales.isfinite().all()
