"""Blocks of whole numbers that a checkpoint has already: they are multiplied with as they are.

GGUF's Q4_0 and Q8_0 are what com.microsoft.MatMulNBits takes, bytes aside. Q4_1 has a minimum of
each block that is no multiple of its scale, which the operator's fast kernels don't take: a product
of its own adds them. Where all matrices of the layers are of these types nothing is rounded a
second time: their weights stay what they are in the file. Embedding and head may be in other types;
then they are rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from llama_decoder.checkpoint import Checkpoint
from llama_decoder.gguf_blocks import BLOCK, Blocks, BlockType
from llama_decoder.names import EMBEDDING, HEAD
from llama_decoder.weights import parameter_shapes
from llama_export.host_weights import Quantised
from llama_export.precision import Precision
from llama_export.quantise.codes import BlockProduct
from llama_export.quantise.rounding import Int4Rounding

Found = dict[str, BlockType | None]


def kept_types(checkpoint: Checkpoint) -> Found | None:
    """The blocks of each matrix, None for a table that isn't in blocks that are kept.

    Returns:
        None where a matrix of a layer isn't in blocks: then all are rounded.
    """
    found = checkpoint.block_types()
    for name in {EMBEDDING, HEAD} & found.keys():
        kind = found[name]
        if kind is not None and kind.has_offsets:  # tables are looked up, which can't add them
            found[name] = None
    in_blocks = all(
        kind is not None for name, kind in found.items() if name not in (EMBEDDING, HEAD)
    )
    return found if in_blocks else None


def as_kept(checkpoint: Checkpoint, precision: Precision) -> Precision:
    """The recipe with the bits and offsets that a checkpoint's matrices keep."""
    found = kept_types(checkpoint)
    if precision.quantised != "int4" or precision.block != BLOCK or found is None:
        return precision
    kept = {name: kind for name, kind in found.items() if kind is not None}
    return replace(
        precision,
        kept=True,
        eight_bits=frozenset(name for name, kind in kept.items() if kind.bits == 8),
        offset=frozenset(name for name, kind in kept.items() if kind.has_offsets),
    )


def kept_blocks(checkpoint: Checkpoint, found: Found) -> Iterator[tuple[str, Quantised]]:
    """Every parameter in the decoder's order: norms in float32, matrices as ``BlockProduct``.

    Args:
        checkpoint: with blocks.
        found: of ``kept_types``; a table without blocks is rounded to the nearest 8 bits.
    """
    for name in parameter_shapes(checkpoint.config):
        if name not in found:
            yield name, checkpoint.weight(name)
        elif found[name] is None:
            yield name, Int4Rounding(BLOCK).table(checkpoint.weight(name))
        else:
            blocks = checkpoint.blocks(name)
            yield name, _product(blocks.widened() if name in (EMBEDDING, HEAD) else blocks)


def _product(blocks: Blocks) -> BlockProduct:
    zero_points = np.full(blocks.scales.shape, 1 << (blocks.bits - 1), np.uint8)
    return BlockProduct(
        blocks.codes, blocks.scales, zero_points, blocks.bits, BLOCK, blocks.offsets
    )
