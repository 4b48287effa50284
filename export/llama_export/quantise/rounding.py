"""The two recipes for products, as the quantiser needs them: 8 by 8 bits, and 4 bits in blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_decoder.weights import Array
from llama_export.quantise.codes import INT8_LIMIT, BlockProduct, Int8Product
from llama_export.quantise.gptq import gptq_blocks, gptq_channels
from llama_export.quantise.grids import (
    PLAIN,
    SHRINKS_8,
    block_grid,
    channel_grid,
    nearest_blocks,
    nearest_channels,
)

Product = Int8Product | BlockProduct


class Rounding(Protocol):
    """How a precision rounds weights, and what its graph makes of activations.

    Attributes:
        migrates: whether scale moves from activations into weights first.
    """

    migrates: ClassVar[bool]

    def activations(self, rows: Tensor) -> Tensor:
        """Activations [..., K] as the graph's product sees them."""

    def rough(self, weights: Tensor) -> Tensor:
        """Weights [N, K] rounded to the nearest without a search, dequantised."""

    def feedback(self, weights: Tensor, factor: Tensor) -> Product:
        """Weights [N, K] rounded with error feedback; factor as of ``triangle``."""

    def nearest(self, weights: Array) -> Product:
        """Weights [N, K] rounded to the nearest without a search."""

    def table(self, rows: Array) -> Product:
        """Embedding or head [V, E]."""


@dataclass(frozen=True, slots=True)
class Int8Rounding:
    """Signed bytes with a scale a row, and activations in unsigned bytes with a scale a row.

    One outlier among a row's activations leaves few levels to the others: so scale migrates.
    """

    migrates: ClassVar[bool] = True

    def activations(self, rows: Tensor) -> Tensor:
        """See ``Rounding``."""
        return _rounded(rows)

    def rough(self, weights: Tensor) -> Tensor:
        """See ``Rounding``."""
        grid = channel_grid(weights, shrinks=PLAIN)
        return grid.values(grid.codes(weights))

    def feedback(self, weights: Tensor, factor: Tensor) -> Product:
        """See ``Rounding``."""
        return gptq_channels(weights, factor)

    def nearest(self, weights: Array) -> Product:
        """See ``Rounding``."""
        return nearest_channels(weights, shrinks=PLAIN)

    def table(self, rows: Array) -> Product:
        """See ``Rounding``."""
        return nearest_channels(rows, shrinks=SHRINKS_8)


@dataclass(frozen=True, slots=True)
class Int4Rounding:
    """4 bits with a scale and a zero point a block; embedding and head have 8.

    Nothing migrates: blocks have scales of their own, and error feedback knows which columns count.
    Measured on SmolLM2, scales moved as AWQ does made the error after feedback 6 to 30 % larger.

    Attributes:
        block: columns of a block, of the activations too.
    """

    migrates: ClassVar[bool] = False
    block: int

    def activations(self, rows: Tensor) -> Tensor:
        """See ``Rounding``."""
        columns = rows.shape[-1]
        padded = F.pad(rows, (0, -columns % self.block))
        blocks = padded.view(*rows.shape[:-1], -1, self.block)
        return _rounded(blocks).flatten(-2)[..., :columns]

    def rough(self, weights: Tensor) -> Tensor:
        """See ``Rounding``."""
        num_rows, columns = weights.shape
        blocks = F.pad(weights, (0, -columns % self.block)).view(-1, self.block)
        grid = block_grid(blocks, None, 4, shrinks=PLAIN)
        return grid.values(grid.codes(blocks)).view(num_rows, -1)[:, :columns]

    def feedback(self, weights: Tensor, factor: Tensor) -> Product:
        """See ``Rounding``."""
        return gptq_blocks(weights, factor, 4, self.block)

    def nearest(self, weights: Array) -> Product:
        """See ``Rounding``."""
        return nearest_blocks(weights, 4, self.block, shrinks=PLAIN)

    def table(self, rows: Array) -> Product:
        """See ``Rounding``."""
        return nearest_blocks(rows, 8, self.block, shrinks=PLAIN)


def _rounded(groups: Tensor) -> Tensor:
    """Symmetric 8 bits with a scale for each of [..., K]."""
    scales = groups.abs().amax(-1, keepdim=True) / INT8_LIMIT
    scales = torch.where(scales > 0, scales, 1.0)
    return (groups / scales).round_().mul_(scales)
