"""What quantised products are, and the bytes that ONNX Runtime's operators take them as.

Everything here is numpy and the reference of its format: ``dequantise`` says which float32 rows
the codes stand for. The matrix of a product is [N, K], rows by columns, as MatMulNBits calls them;
b is the number of columns that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

INT8_LIMIT = 127  # the codes are symmetric: -128 is left out


@dataclass(frozen=True, slots=True)
class Int8Product:
    """A matrix in signed bytes with one scale a row, w = s * q.

    Attributes:
        codes: int8 [N, K], in -127..127.
        scales: float32 [N], above 0.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def dequantise(self) -> NDArray[np.float32]:
        """The float32 rows [N, K] that it stands for."""
        rows = self.codes.astype(np.float32)
        rows *= self.scales[:, None]
        return rows

    def taken(self, rows: NDArray[np.int64]) -> Int8Product:
        """Some rows, as an embedding is looked up."""
        return Int8Product(self.codes[rows], self.scales[rows])


@dataclass(frozen=True, slots=True)
class BlockProduct:
    """A matrix in unsigned codes with a scale and a zero point a block, w = s * (q - z) + c.

    Where K is no multiple of b, the last block of a row is shorter.

    Attributes:
        codes: uint8 [N, K], below 2^bits.
        scales: float32 [N, ceil(K/b)], above 0.
        zero_points: uint8 [N, ceil(K/b)], below 2^bits.
        bits: 4 or 8.
        block: b, a power of two and at least 16.
        offsets: c, float32 [N, ceil(K/b)], which a product of its own adds; None stands for 0.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]
    bits: int
    block: int
    offsets: NDArray[np.float32] | None = None

    def dequantise(self) -> NDArray[np.float32]:
        """The float32 rows [N, K] that it stands for."""
        rows = self.codes.astype(np.float32)
        rows -= _over_columns(self.zero_points, self)
        rows *= _over_columns(self.scales, self)
        if self.offsets is not None:
            rows += _over_columns(self.offsets, self)
        return rows

    def taken(self, rows: NDArray[np.int64]) -> BlockProduct:
        """Some rows, as an embedding is looked up."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zero_points=self.zero_points[rows],
            offsets=None if self.offsets is None else self.offsets[rows],
        )

    def packed(self) -> NDArray[np.uint8]:
        """The codes as MatMulNBits' input B: uint8 [N, ceil(K/b), b * bits / 8].

        Of two 4-bit codes in a byte the first is in the lower half. What fills up a last block is
        its zero point, which stands for 0.
        """
        num_rows, columns = self.codes.shape
        num_blocks = self.scales.shape[1]
        codes = self.codes
        missing = num_blocks * self.block - columns
        if missing:
            last = np.repeat(self.zero_points[:, -1:], missing, axis=1)
            codes = np.concatenate([codes, last], axis=1)
        blocks = codes.reshape(num_rows, num_blocks, self.block)
        return blocks if self.bits == 8 else _pairs(blocks)

    def packed_zero_points(self) -> NDArray[np.uint8]:
        """The zero points as MatMulNBits takes them.

        Returns:
            uint8 [N, ceil(K/b)] for 8 bits; for 4, two in a byte, each row filled up to a byte:
            [N, ceil(ceil(K/b) / 2)].
        """
        if self.bits == 8:
            return self.zero_points
        return _pairs(np.pad(self.zero_points, [(0, 0), (0, self.zero_points.shape[1] % 2)]))


def unpack(
    packed: NDArray[np.uint8],
    scales: NDArray[np.float32],
    packed_zero_points: NDArray[np.uint8],
    bits: int,
    columns: int,
) -> BlockProduct:
    """Undo ``packed`` and ``packed_zero_points``.

    Args:
        packed: [N, ceil(K/b), b * bits / 8].
        scales: [N, ceil(K/b)].
        packed_zero_points: as packed for that number of bits.
        bits: 4 or 8.
        columns: K.
    """
    codes, zero_points = packed, packed_zero_points
    if bits == 4:
        codes = _halves(packed)
        zero_points = _halves(packed_zero_points)[:, : scales.shape[1]]
    block = codes.shape[2]
    rows = codes.reshape(len(codes), -1)[:, :columns]
    return BlockProduct(np.ascontiguousarray(rows), scales, zero_points, bits, block)


def num_blocks(columns: int, block: int) -> int:
    """Blocks of a row, the last of which may be shorter."""
    return -(-columns // block)


def _over_columns(of_blocks: NDArray[Any], product: BlockProduct) -> NDArray[np.float32]:
    repeated = np.repeat(of_blocks, product.block, axis=1)[:, : product.codes.shape[1]]
    return repeated.astype(np.float32, copy=False)


def _pairs(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    packed: NDArray[np.uint8] = values[..., 1::2] << np.uint8(4)
    packed |= values[..., 0::2]
    return packed


def _halves(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    values = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    values[..., 0::2] = packed & 15
    values[..., 1::2] = packed >> 4
    return values
