"""The block types of a GGUF file as whole numbers, for products that read them as they are.

A row is cut into blocks of 32 columns, each of which has one scale: a weight is scale · (code -
zero), and in Q4_1, whose zero is 0, a minimum more. The types: ``block_q4_0``, ``block_q4_1`` and
``block_q8_0`` in ggml-common.h of https://github.com/ggml-org/llama.cpp
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

BLOCK = 32  # columns
_KINDS = gguf.GGMLQuantizationType


class BlockType(NamedTuple):
    """What distinguishes the types: bits of a code, and whether blocks have offsets."""

    bits: int
    has_offsets: bool


BLOCK_TYPES = {
    _KINDS.Q4_0: BlockType(4, has_offsets=False),
    _KINDS.Q4_1: BlockType(4, has_offsets=True),
    _KINDS.Q8_0: BlockType(8, has_offsets=False),
}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [N, K] in blocks.

    Attributes:
        codes: uint8 [N, K], below 2^bits; 2^(bits-1) stands for 0.
        scales: float32 [N, K/32].
        bits: 4 or 8.
        offsets: float32 [N, K/32], what all weights of a block have more; None if they haven't.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int
    offsets: NDArray[np.float32] | None = None

    def widened(self) -> Blocks:
        """The same values with 8 bits a code; of blocks without offsets."""
        if self.bits == 8:
            return self
        return Blocks(self.codes + np.uint8(128 - 8), self.scales, 8)

    def with_rows(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Blocks:
        """The same with something done to the rows of all arrays."""
        offsets = None if self.offsets is None else change(self.offsets)
        return Blocks(change(self.codes), change(self.scales), self.bits, offsets)


def read_blocks(stored: NDArray[np.uint8], kind: gguf.GGMLQuantizationType) -> Blocks:
    """Take rows apart.

    Args:
        stored: [N, bytes of a row].
        kind: one of ``BLOCK_TYPES``.
    """
    bits, has_offsets = BLOCK_TYPES[kind]
    head_bytes = 4 if has_offsets else 2  # a scale in fp16, and a minimum
    blocks = stored.reshape(len(stored), -1, head_bytes + BLOCK * bits // 8)
    heads = blocks[..., :head_bytes].copy().view("<f2").astype(np.float32)
    scales, numbers = np.ascontiguousarray(heads[..., 0]), blocks[..., head_bytes:]
    if bits == 8:
        codes = numbers ^ np.uint8(128)  # signed ones, and 128 more
    else:  # the lower halves are the first 16 columns
        codes = np.concatenate([numbers & 15, numbers >> 4], axis=2)
    # A minimum is where code 0 lies. Codes about 0 lose less where activations are rounded.
    offsets = heads[..., 1] + 8 * scales if has_offsets else None
    return Blocks(codes.reshape(len(stored), -1), scales, bits, offsets)


def stacked(parts: Sequence[Blocks]) -> Blocks:
    """Matrices of one type, one below the other."""
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Blocks(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        parts[0].bits,
        np.concatenate(offsets) if offsets else None,
    )
