"""Error feedback is what its paper says, and worth its while."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_export.errors import ExportError
from llama_export.quantise.codes import Int8Product
from llama_export.quantise.gptq import gptq_blocks, gptq_channels, triangle
from llama_export.quantise.grids import block_grid, nearest_blocks, nearest_channels

COLUMNS = 160


def correlated_inputs(rows: int = 600, columns: int = COLUMNS) -> Tensor:
    """Rows whose columns go along with each other, of sizes apart by a factor of 30."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(rows, columns // 8, generator=generator)
    mixed = few @ torch.randn(columns // 8, columns, generator=generator)
    noise = 0.5 * torch.randn(rows, columns, generator=generator)
    return (mixed + noise) * torch.logspace(-0.75, 0.75, columns)


def weights() -> Tensor:
    return torch.randn(48, COLUMNS, generator=torch.Generator().manual_seed(1))


def output_error(x: Tensor, rounded: np.ndarray) -> float:
    return float((x @ (weights() - torch.from_numpy(rounded)).T).square().sum())


def by_the_paper(block: int, x: Tensor, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of arXiv 2210.17323 in float64, column by column and without lazy batches.

    Weighted by what a rounding error costs, the grid is that of the updated weights at the start
    of each block.
    """
    gram = (x.T @ x).double()
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    w = weights().double()
    codes, rounded = torch.zeros_like(w), torch.zeros_like(w)
    grid = None
    for i in range(len(gram)):
        if i % block == 0:
            ends = slice(i, i + block)
            importance = inverse.diagonal()[ends] ** -2
            grid = block_grid(w[:, ends].float(), importance.float(), 4)
        assert grid is not None
        codes[:, i] = grid.codes(w[:, i].float())
        rounded[:, i] = grid.values(codes[:, i].float())
        error = (w[:, i] - rounded[:, i]) / inverse[i, i]
        w[:, i:] -= error[:, None] * inverse[i, i:]
    return codes.numpy(), rounded.numpy()


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_codes_are_those_of_the_paper(block: int) -> None:
    x = correlated_inputs()
    codes, rounded = by_the_paper(block, x, damping=0.01)
    product = gptq_blocks(weights(), triangle("w", x.T @ x, 0.01), 4, block)
    # A tie that float32 and float64 break differently changes what comes after it in its row.
    same = (product.codes == codes).all(axis=1)
    assert same.mean() > 0.7
    np.testing.assert_allclose(product.dequantise()[same], rounded[same], rtol=1e-3, atol=1e-4)
    assert output_error(x, product.dequantise()) == pytest.approx(
        output_error(x, rounded.astype(np.float32)), rel=0.02
    )


@pytest.mark.parametrize("block", [32, 128, 256])
def test_feedback_beats_rounding_to_the_nearest(block: int) -> None:
    x = correlated_inputs()
    fed = gptq_blocks(weights(), triangle("w", x.T @ x), 4, block)
    nearest = nearest_blocks(weights().numpy(), 4, block)
    assert output_error(x, fed.dequantise()) < 0.5 * output_error(x, nearest.dequantise())
    assert fed.scales.shape == nearest.scales.shape


def test_feedback_beats_rounding_to_the_nearest_in_bytes() -> None:
    x = correlated_inputs()
    fed = gptq_channels(weights(), triangle("w", x.T @ x))
    nearest = nearest_channels(weights().numpy())
    assert output_error(x, fed.dequantise()) < 0.5 * output_error(x, nearest.dequantise())
    assert np.abs(fed.codes).max() <= 127


def test_the_sum_over_like_columns_is_kept() -> None:
    """Where all columns of the input are the same, only the sum of a row's weights counts."""
    x = torch.ones(50, 64) + 0.01 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    rows = weights()[:, :64]
    product = gptq_blocks(rows, triangle("w", x.T @ x, 1e-4), 4, 32)
    off = product.dequantise().sum(1) - rows.sum(1).numpy()
    step = product.scales.max()
    assert np.abs(off).max() < step
    plain = nearest_blocks(rows.numpy(), 4, 32).dequantise().sum(1) - rows.sum(1).numpy()
    assert np.abs(off).mean() < 0.3 * np.abs(plain).mean()


def test_the_factor_is_one_of_the_gram_matrix() -> None:
    x = correlated_inputs()
    gram = x.T @ x
    factor = triangle("w", gram.clone(), damping=0.01)
    assert factor.tril(-1).abs().max() == 0
    added = 0.01 * gram.diagonal().mean() * torch.eye(COLUMNS)
    torch.testing.assert_close(factor @ factor.T, gram + added, rtol=1e-3, atol=1e-2)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x = correlated_inputs()
    x[:, [0, 70, 159]] = 0
    product = gptq_blocks(weights(), triangle("w", x.T @ x), 4, 32)
    rounded = product.dequantise()
    assert np.isfinite(rounded).all()
    # Nothing is known of their inputs, so their weights are kept about as well as any.
    off = np.abs(rounded - weights().numpy())
    assert off[:, [0, 70, 159]].mean() < 1.5 * off.mean()
    # No input at all.
    nothing = gptq_channels(weights(), triangle("w", torch.zeros(COLUMNS, COLUMNS)))
    assert isinstance(nothing, Int8Product)
    nearest = np.abs(nothing.dequantise() - weights().numpy())
    assert (nearest <= nothing.scales[:, None] * 20).all()


def test_a_gram_matrix_that_is_hardly_one_is_damped_more() -> None:
    few = correlated_inputs(rows=3)
    gram = few.T @ few
    gram.diagonal().sub_(gram.diagonal().mean() * 1e-3)  # float32 sums of long texts do that
    factor = triangle("w", gram, damping=1e-6)
    assert factor.isfinite().all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_gram_matrix_of_no_numbers_is_refused(wrong: float) -> None:
    with pytest.raises(ExportError, match=r"the inputs of layer\.7\.o are not finite"):
        triangle("layer.7.o", torch.full((4, 4), wrong))
