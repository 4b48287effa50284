"""Rounding with error feedback: what one column is off by is made up for by those after it.

Of a product with inputs X [T, K], the error that counts is ||(W - Q) X^T||^2 = tr(E G E^T), with
E = W - Q and the Gram matrix G = X^T X. With G = R R^T, R upper triangular, that is ||E R||^2, and
column j of E R holds the errors of columns 0..j only. So, going from the first column to the last,
the best code for column j is the one nearest to w_j + sum_{i<j} E_i R_ij / R_jj. This is GPTQ
(Frantar et al., arXiv 2210.17323), whose form with the inverse of G gives the same codes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llama_export.errors import ExportError
from llama_export.quantise.codes import BlockProduct, Int8Product, num_blocks
from llama_export.quantise.grids import SHRINKS_8, Grid, block_grid, channel_grid

# Added to the Gram matrix's diagonal, as a share of its mean. Measured on SmolLM2: the error on
# other texts is least from 0.1 to 0.2, and 2 % more with the 0.01 that is common.
DAMPING = 0.1
_PANEL = 128  # columns whose earlier errors are brought together in one product
_TRIES = 6  # times that the damping is made ten times larger before giving up

GridOf = Callable[[Tensor, Tensor], Grid]


def gptq_blocks(weights: Tensor, factor: Tensor, bits: int, block: int) -> BlockProduct:
    """Round to blocks; each block's grid is found when it is reached, on what feedback made of it.

    Args:
        weights: float32 [N, K].
        factor: float32 [K, K], ``triangle`` of the product's inputs.
        bits: 4 or 8.
        block: b.
    """
    num_rows, columns = weights.shape
    count = num_blocks(columns, block)
    scales, zeros = torch.empty(num_rows, count), torch.empty(num_rows, count)
    found = 0

    def grid_of(values: Tensor, importance: Tensor) -> Grid:
        nonlocal found
        grid = block_grid(values, importance, bits)
        scales[:, found], zeros[:, found] = grid.scales, grid.zeros
        found += 1
        return grid

    codes = _with_feedback(weights, factor, block, grid_of)
    return BlockProduct(
        codes.numpy().astype(np.uint8), scales.numpy(), zeros.numpy().astype(np.uint8), bits, block
    )


def gptq_channels(weights: Tensor, factor: Tensor) -> Int8Product:
    """Round to signed bytes with one scale a row; see ``gptq_blocks``."""
    scales = torch.empty(len(weights))

    def grid_of(values: Tensor, importance: Tensor) -> Grid:
        grid = channel_grid(values, importance, shrinks=SHRINKS_8)
        scales.copy_(grid.scales)
        return grid

    codes = _with_feedback(weights, factor, weights.shape[1], grid_of)
    return Int8Product(codes.numpy().astype(np.int8), scales.numpy())


def triangle(name: str, gram: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangular R with R R^T = G, damped.

    A column that is always 0 has 0 in G; damping alone makes its weights be rounded to the nearest.

    Args:
        name: the parameter, for messages.
        gram: float32 [K, K]; used up.
        damping: share of the diagonal's mean that is added to it; more where it isn't enough.

    Raises:
        ExportError: the Gram matrix isn't that of finite numbers.
    """
    mean = gram.diagonal().mean().item()
    if not np.isfinite(mean):
        raise ExportError(
            f"the inputs of {name} are not finite numbers on the calibration text: the weights "
            "are broken, or not those of this configuration"
        )
    step = max(damping * mean, float(np.finfo(np.float32).tiny) * 2**20)
    added = 0.0
    for _ in range(_TRIES):
        gram.diagonal().add_(step - added)
        added = step
        # The factor of the matrix that is turned round, turned round, is an upper one.
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(gram.flip(0, 1))
        if not failed:
            return factor.flip(0, 1)
        step *= 10
    raise ExportError(
        f"the inputs of {name} on the calibration text have no Gram matrix that can be used: "
        "the weights are broken, or not those of this configuration"
    )


def _with_feedback(weights: Tensor, factor: Tensor, block: int, grid_of: GridOf) -> Tensor:
    """Codes, float32 [N, K].

    Args:
        weights: [N, K].
        factor: R.
        block: columns that share a grid.
        grid_of: from a block's updated weights [N, b] and what their squared errors count [b].
    """
    columns = weights.shape[1]
    error, codes = torch.zeros_like(weights), torch.empty_like(weights)
    panel = block if block < columns else _PANEL
    grid: Grid | None = None
    for start in range(0, columns, panel):
        part = slice(start, min(start + panel, columns))
        values, corner = weights[:, part], factor[part, part]
        carried = error[:, :start] @ factor[:start, part]
        if grid is None or block < columns:
            if start:  # what the block's columns would be if none of them were rounded
                values = values + torch.linalg.solve_triangular(
                    corner, carried, upper=True, left=False
                )
            whole = weights if block >= columns else values
            importance = factor.diagonal()[start : start + block].square()
            grid = grid_of(whole, importance)
        errors, chosen = _panel(weights[:, part].T, carried.T, corner, grid)
        error[:, part], codes[:, part] = errors.T, chosen.T
    return codes


def _panel(values: Tensor, carried: Tensor, corner: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Errors and codes of some columns, which are rows here: all are [b, N] but R's corner."""
    values, carried = values.contiguous(), carried.contiguous()
    errors, codes = torch.zeros_like(values), torch.empty_like(values)
    for j in range(len(values)):
        pending = torch.addmv(carried[j], errors[:j].T, corner[:j, j])
        codes[j] = grid.codes(values[j] + pending / corner[j, j])
        errors[j] = values[j] - grid.values(codes[j])
    return errors, codes
