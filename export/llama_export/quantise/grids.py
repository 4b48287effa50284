"""Scales and zero points: which evenly spaced numbers stand for the values of a block or a row.

A grid that reaches the largest value wastes levels on it. So several narrower ones are tried, each
with the scale that fits its codes best, and the one with the least squared error is taken; an
importance for each column says whose error counts most.

The tensors are torch's, float32. G is the number of groups of values that have a grid each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_export.quantise.codes import INT8_LIMIT, BlockProduct, Int8Product, num_blocks

SHRINKS_4 = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.62)  # of the width that holds every value
SHRINKS_8 = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8)
PLAIN = (1.0,)  # no search: for weights whose quality nobody measures
_TINIEST = 1e-12  # a scale that keeps 1/s finite and stands for nothing else
_CHUNK = 1 << 22  # values that are searched at once: 16 MB, a few times


class Grid(NamedTuple):
    """The levels of G groups: s * (q - z) for whole q in low..high.

    Attributes:
        scales: [G], above 0.
        zeros: [G], whole numbers in low..high.
        low: the lowest code.
        high: the highest.
    """

    scales: Tensor
    zeros: Tensor
    low: int
    high: int

    def codes(self, values: Tensor) -> Tensor:
        """The nearest codes, float32, of values [G, ...]."""
        shape = (-1, *[1] * (values.dim() - 1))
        codes = (values / self.scales.view(shape)).round_().add_(self.zeros.view(shape))
        return codes.clamp_(self.low, self.high)

    def values(self, codes: Tensor) -> Tensor:
        """What codes [G, ...] stand for."""
        shape = (-1, *[1] * (codes.dim() - 1))
        return (codes - self.zeros.view(shape)).mul_(self.scales.view(shape))


def block_grid(
    values: Tensor,
    importance: Tensor | None,
    bits: int,
    *,
    shrinks: tuple[float, ...] = SHRINKS_4,
) -> Grid:
    """Unsigned grids of blocks.

    Args:
        values: [G, b].
        importance: what a squared error counts in each column, [b] or [G, b]; None for all the
            same.
        bits: 4 or 8.
        shrinks: widths to try, as shares of that which holds every value.
    """
    high = 2**bits - 1
    lowest, highest = values.amin(1).clamp_(max=0), values.amax(1).clamp_(min=0)
    scales = ((highest - lowest) / high).clamp_(min=_TINIEST)
    zero = (-lowest / scales).round_().clamp_(0, high)
    near = (0, -1, 1) if len(shrinks) > 1 else (0,)
    zeros = [(zero + step).clamp_(0, high) for step in near]
    grids = [Grid(scales * share, zero, 0, high) for share in shrinks for zero in zeros]
    return _best(grids, values, importance)


def channel_grid(
    values: Tensor, importance: Tensor | None = None, *, shrinks: tuple[float, ...] = SHRINKS_8
) -> Grid:
    """Signed 8-bit grids of rows; see ``block_grid``.

    Args:
        values: [G, K].
        importance: [K] or [G, K].
        shrinks: widths to try.
    """
    scales = (values.abs().amax(1) / INT8_LIMIT).clamp_(min=_TINIEST)
    zeros = torch.zeros_like(scales)
    grids = [Grid(scales * share, zeros, -INT8_LIMIT, INT8_LIMIT) for share in shrinks]
    return _best(grids, values, importance)


def nearest_blocks(
    rows: NDArray[np.float32],
    bits: int,
    block: int,
    *,
    shrinks: tuple[float, ...] = SHRINKS_4,
) -> BlockProduct:
    """Rows [N, K], each value at the nearest level of its block's grid."""
    num_rows, columns = rows.shape
    count = num_blocks(columns, block)
    codes = np.empty((num_rows, columns), np.uint8)
    scales = np.empty((num_rows, count), np.float32)
    zero_points = np.empty((num_rows, count), np.uint8)
    for part in _row_parts(num_rows, columns):
        values = torch.from_numpy(np.ascontiguousarray(rows[part]))
        # Zeros that fill a block up change no grid: every grid holds 0.
        values = torch.nn.functional.pad(values, (0, count * block - columns))
        values = values.view(-1, block)
        grid = block_grid(values, None, bits, shrinks=shrinks)
        codes[part] = grid.codes(values).view(-1, count * block)[:, :columns].numpy()
        scales[part] = grid.scales.view(-1, count).numpy()
        zero_points[part] = grid.zeros.view(-1, count).numpy()
    return BlockProduct(codes, scales, zero_points, bits, block)


def nearest_channels(
    rows: NDArray[np.float32],
    *,
    shrinks: tuple[float, ...] = SHRINKS_8,
    turn: Callable[[Tensor], Tensor] = lambda part: part,
) -> Int8Product:
    """Rows [N, K] in signed bytes, each value at the nearest level of its row's grid.

    Args:
        rows: as they are given.
        shrinks: widths to try.
        turn: what is rounded of some of the rows, so that it needn't be in memory whole.
    """
    num_rows, columns = rows.shape
    codes = np.empty((num_rows, columns), np.int8)
    scales = np.empty(num_rows, np.float32)
    for part in _row_parts(num_rows, columns):
        values = turn(torch.from_numpy(np.ascontiguousarray(rows[part])))
        grid = channel_grid(values, shrinks=shrinks)
        codes[part] = grid.codes(values).numpy()
        scales[part] = grid.scales.numpy()
    return Int8Product(codes, scales)


def _best(grids: list[Grid], values: Tensor, importance: Tensor | None) -> Grid:
    """Of several grids for the same groups, the best of each group."""
    if len(grids) == 1:
        return grids[0]
    weight = torch.ones(()) if importance is None else importance
    first = grids[0]
    scales, zeros = first.scales.clone(), first.zeros.clone()
    least = torch.full_like(scales, torch.inf)
    for grid in grids:
        fitted = _fitted(grid, values, weight)
        error = (fitted.values(fitted.codes(values)) - values).square_().mul_(weight).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, fitted.scales, scales)
        zeros = torch.where(better, fitted.zeros, zeros)
    return first._replace(scales=scales, zeros=zeros)


def _fitted(grid: Grid, values: Tensor, weight: Tensor) -> Grid:
    """The grid with the scale that has the least squared error for its own codes."""
    steps = grid.codes(values) - grid.zeros[:, None]
    weighted = steps * weight
    power = (weighted * steps).sum(1)
    scales = (weighted * values).sum(1) / power
    usable = (power > 0) & (scales > _TINIEST)
    return grid._replace(scales=torch.where(usable, scales, grid.scales))


def _row_parts(num_rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK // columns)
    return [slice(start, start + step) for start in range(0, num_rows, step)]
