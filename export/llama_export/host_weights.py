"""What the weight file of a quantised bundle for the CPU holds, tensor by tensor.

Norms stay in float32; every matrix is codes and what they are multiplied with. Embedding and head
are one matrix in the file where the model has them so.

Shape letters are those of ``llama_runtime.contract``; a product's matrix is [N', K].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property

import numpy as np

from llama_decoder.config import LlamaConfig
from llama_decoder.names import EMBEDDING, HEAD, LAST_NORM
from llama_decoder.weights import parameter_shapes
from llama_export.errors import ExportError
from llama_export.quantise.codes import BlockProduct, Int8Product
from llama_export.quantise.rounding import HEAD_TURN
from llama_export.weight_file import Piece, Stored

BLOCK = 32  # columns that share a scale unless it is told
BLOCKS = (32, 64, 128)

Quantised = Int8Product | BlockProduct | np.ndarray


class Int8Weights:
    """A byte a weight and a scale for each output channel, for MatMulIntegerToFloat.

    That operator takes a matrix as [K, N'], and an embedding is looked up by rows: so a matrix that
    is both stays [V, E], and the graph turns it while it is loaded.

    Args:
        config: the model's numbers.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self.shapes = parameter_shapes(config)
        self._tied = config.tie_embeddings

    def names(self, parameter: str) -> tuple[str, str]:
        """The tensors that hold a matrix: codes and scales."""
        return f"{parameter}.codes", f"{parameter}.scales"

    @cached_property
    def layout(self) -> dict[str, Stored]:
        """Every tensor of the parameters, in file order."""
        layout = {}
        for name, shape in self.shapes.items():
            if len(shape) == 1:
                layout[name] = Stored("F32", shape)
                if name == LAST_NORM and self._tied:
                    layout[HEAD_TURN] = Stored("F32", shape * 2)
                continue
            codes, scales = self.names(name)
            layout[codes] = Stored("I8", shape if name == EMBEDDING else shape[::-1])
            layout[scales] = Stored("F32", shape[:1])
        return layout

    def pieces(self, parameter: str, value: Quantised) -> Iterator[tuple[str, Piece]]:
        """A parameter's tensors, in file order."""
        if not isinstance(value, Int8Product):
            yield parameter, _floats(value)
            return
        codes, scales = self.names(parameter)
        yield codes, value.codes if parameter == EMBEDDING else np.ascontiguousarray(value.codes.T)
        yield scales, value.scales


class BlockWeights:
    """4 bits a weight, 8 in embedding and head, in blocks of a row, for MatMulNBits.

    Blocks may have offsets, which that operator doesn't know: a small product of float32 adds them,
    of the sums of the activations over each block.

    Args:
        config: the model's numbers.
        block: columns that share a scale and a zero point.
        eight_bits: further matrices that have 8 bits.
        offset: matrices whose blocks have offsets.

    Attributes:
        eight_bits: all matrices that have 8 bits.

    Raises:
        ExportError: a matrix can't be cut into such blocks.
    """

    def __init__(
        self,
        config: LlamaConfig,
        block: int = BLOCK,
        eight_bits: Collection[str] = (),
        offset: Collection[str] = (),
    ) -> None:
        self.shapes = parameter_shapes(config)
        self.block = block
        self.eight_bits = frozenset({EMBEDDING, HEAD, *eight_bits})
        self._offset = frozenset(offset)
        for name, shape in self.shapes.items():
            if len(shape) > 1 and shape[1] % block:
                fitting = [b for b in BLOCKS if not shape[1] % b]
                better = f"--block-size {fitting[-1]}" if fitting else "--precision int8"
                raise ExportError(
                    f"{name} has {shape[1]:,} columns, which is no multiple of {block}: build with "
                    f"{better}"
                )

    def names(self, parameter: str) -> tuple[str, str, str]:
        """The tensors that hold a matrix: codes, scales and zero points."""
        return f"{parameter}.codes", f"{parameter}.scales", f"{parameter}.zero_points"

    def offsets_name(self, parameter: str) -> str | None:
        """The tensor with the offsets of a matrix, [K/b, N']; None if it has none."""
        return f"{parameter}.offsets" if parameter in self._offset else None

    def bits(self, parameter: str) -> int:
        """Of a weight: embedding and head matter most to the likeliest token."""
        return 8 if parameter in self.eight_bits else 4

    @cached_property
    def layout(self) -> dict[str, Stored]:
        """Every tensor of the parameters, in file order."""
        layout = {}
        for name, shape in self.shapes.items():
            if len(shape) == 1:
                layout[name] = Stored("F32", shape)
                continue
            bits, blocks = self.bits(name), shape[1] // self.block
            codes, scales, zero_points = self.names(name)
            layout[codes] = Stored("U8", (shape[0], blocks, self.block * bits // 8))
            layout[scales] = Stored("F32", (shape[0], blocks))
            layout[zero_points] = Stored("U8", (shape[0], -(-blocks * bits // 8)))
            offsets = self.offsets_name(name)
            if offsets is not None:
                layout[offsets] = Stored("F32", (blocks, shape[0]))
        return layout

    def pieces(self, parameter: str, value: Quantised) -> Iterator[tuple[str, Piece]]:
        """A parameter's tensors, in file order."""
        if not isinstance(value, BlockProduct):
            yield parameter, _floats(value)
            return
        codes, scales, zero_points = self.names(parameter)
        yield codes, value.packed()
        yield scales, value.scales
        yield zero_points, value.packed_zero_points()
        offsets = self.offsets_name(parameter)
        if offsets is not None and value.offsets is not None:
            yield offsets, np.ascontiguousarray(value.offsets.T)


def finer_matrices(config: LlamaConfig) -> frozenset[str]:
    """Matrices that are rounded to 8 bits where most have 4, for 4 would cost too much there.

    All of q, k and v, which are few; and down in the first and the last eighth of the layers and in
    every third between.
    """
    num_layers = config.num_layers
    eighth = num_layers // 8
    downs = {
        layer
        for layer in range(num_layers)
        if not eighth <= layer < num_layers - eighth or (layer - eighth) % 3 == 2
    }
    return frozenset(
        f"model.layers.{layer}.{matrix}.weight"
        for layer in range(num_layers)
        for matrix in ("self_attn.qkv_proj", "mlp.down_proj")
        if matrix == "self_attn.qkv_proj" or layer in downs
    )


def _floats(value: Quantised) -> Piece:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"expected an array, got {type(value).__name__}")
    return value
