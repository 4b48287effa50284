"""In which numbers a bundle holds its weights: one recipe a precision.

A recipe says what type each parameter has in the weight file, and which of the ``encoders`` makes
the stored bytes of float32 rows. Rows are stored in blocks, so the float32 form of a whole matrix
and its stored form need not be in memory together, and blocks may be made by several threads.

Shape letters are those of ``llama_runtime.contract``; the matrix of a product is [N, K] here, as
the operator MatMulNBits calls its rows and columns, and [K, N] where it is stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Literal

import numpy as np

from llama_decoder.config import LlamaConfig
from llama_decoder.weights import parameter_shapes
from llama_export.cache_passes import cache_layout
from llama_export.encoders import ENCODERS, Rows, encode_int4, int4_names, int4_tensors, transposed
from llama_export.errors import ExportError
from llama_export.host_weights import BLOCK, BlockWeights, Int8Weights, finer_matrices
from llama_export.weight_file import Piece, Stored, Tag
from llama_runtime.contract import MAX_CHUNK, PAGED, SLOTS, TENSORRT, Dialect, DType

TARGETS = {"cpu": SLOTS, "cuda": PAGED, "tensorrt": TENSORRT}
# For which PagedAttention decodes from 8 bits in its fast kernel, if a KV head has 4, 6, 8, 16 or
# 32 query heads; slower kernels run if not.
FP8_HEAD_DIMS = (64, 128, 256)
PRODUCTS = (
    *("qkv_proj.weight", "o_proj.weight"),
    *("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
)

BLOCK_ELEMENTS = 1 << 20  # of the rows that are stored at once: 4 MB of float32


@dataclass(frozen=True, slots=True)
class Precision:
    """A recipe.

    Attributes:
        name: as the manifest records it.
        target: ``cpu``, ``cuda`` or ``tensorrt``: what it is for.
        activations: element type between the operators and of the logits.
        tag: element type of the parameters and the RoPE tables.
        int4: whether the products of the layers have 4 bits a weight, signed ones for TensorRT.
        transposed: whether the products of the layers are stored as [K, N], for which cuBLAS has
            faster kernels: measured on an H100, a step of Llama 3.2 1B takes 1.413 ms in place of
            1.436 with one sequence, and 2.151 in place of 2.282 with 128.
        least_agreement: share of likeliest tokens below which the weights are broken, not rounded.
        near_tie: two logits this close may change places, in standard deviations of the logits.
        cache: element type of keys and values, if it is not that of the activations.
        quantised: for the CPU, whether its weights have 8 bits, or 4 in blocks.
        calibrated: whether they are rounded as a calibration text asks for; else to the nearest.
        block: columns that share a scale where weights have 4 bits.
        kept: whether the blocks of the source are taken as they are.
        eight_bits: matrices that have 8 bits where others have 4, beside embedding and head.
        offset: matrices whose blocks have offsets.
    """

    name: str
    target: str
    activations: DType
    tag: Tag
    int4: bool = False
    transposed: bool = False
    least_agreement: float = 1.0
    near_tie: float = 0.0
    cache: DType | None = None
    quantised: Literal["int8", "int4"] | None = None
    calibrated: bool = True
    block: int = BLOCK
    kept: bool = False
    eight_bits: frozenset[str] = frozenset()
    offset: frozenset[str] = frozenset()

    @property
    def dialect(self) -> Dialect:
        """The dialect of the graph, typed."""
        return TARGETS[self.target].typed(self.activations, self.cache)

    @property
    def int4_mask(self) -> np.uint8:
        """What turns the bytes of ``encode_int4`` into those that are stored, and back."""
        return np.uint8(0x88 if self.target == "tensorrt" else 0)  # x - 8 is x ^ 8 in 4 bits

    @property
    def weights(self) -> str:
        """The name of what the weights are stored in, whatever the cache is."""
        return self.name.partition("+")[0]

    def check(self, config: LlamaConfig) -> None:
        """Refuse a model that the precision is not for, before anything is written.

        Raises:
            ExportError: there is no fast kernel for a cache of that type and head dimension, or a
                matrix can't be cut into blocks.
        """
        self.layout(config)
        if self.cache == "float8e4m3fn" and config.head_dim not in FP8_HEAD_DIMS:
            raise ExportError(
                f"the model has a head dimension of {config.head_dim}, and an fp8 cache needs "
                f"{', '.join(map(str, FP8_HEAD_DIMS[:-1]))} or {FP8_HEAD_DIMS[-1]}: build with "
                "--kv-cache same"
            )

    @property
    def recipe(self) -> dict[str, object]:
        """What a manifest says beside the name of how a bundle for the CPU was rounded."""
        if self.quantised is None:
            return {}
        how = "calibrated" if self.calibrated else "nearest"
        block = {"block_size": self.block} if self.quantised == "int4" else {}
        return block | {"rounding": "kept from the source" if self.kept else how}

    @property
    def finer(self) -> str | None:
        """What rounds the weights less, in the words of a user's options; None if nothing does."""
        if self.quantised is None or self.kept:
            return None
        if not self.calibrated:
            return "build without --no-calibration"
        return "build with --block-size 32" if self.block > BLOCK else None

    @property
    def is_rounded(self) -> bool:
        """Whether it is for the CPU, and its weights or its cache are rounded."""
        return self.target == "cpu" and (self.quantised is not None or self.cache is not None)

    def host_weights(self, config: LlamaConfig) -> Int8Weights | BlockWeights | None:
        """How a model's weights are stored quantised for the CPU; None if they aren't.

        Raises:
            ExportError: a matrix can't be cut into blocks.
        """
        if self.quantised == "int8":
            return Int8Weights(config)
        if self.quantised == "int4":
            eight_bits = self.eight_bits if self.kept else finer_matrices(config)
            return BlockWeights(config, self.block, eight_bits, self.offset)
        return None

    def stored_names(self, parameter: str) -> tuple[str, ...]:
        """The tensors that hold a parameter."""
        return int4_names(parameter) if self._is_int4(parameter) else (parameter,)

    def layout(self, config: LlamaConfig) -> dict[str, Stored]:
        """Every stored tensor of a model in file order: parameters, then RoPE tables.

        Raises:
            ExportError: a product can't be cut into blocks.
        """
        layout: dict[str, Stored] = {}
        table = (config.max_positions + MAX_CHUNK, config.head_dim // 2)
        shapes: dict[str, tuple[int, ...]] = {"rope_cos": table, "rope_sin": table}
        weights = self.host_weights(config)
        if weights is not None:
            layout |= weights.layout
        else:
            shapes = parameter_shapes(config) | shapes
        for name, shape in shapes.items():
            if self._is_int4(name):
                layout |= zip(int4_names(name), int4_tensors(name, shape), strict=True)
            else:
                layout[name] = Stored(self.tag, shape[::-1] if self.is_transposed(name) else shape)
        if self.target == "cpu" and self.cache is not None:
            layout |= cache_layout(config)
        return layout

    def encode(self, parameter: str, rows: Rows) -> tuple[Piece, ...]:
        """Some rows of a parameter as they are stored, a piece for each of ``stored_names``.

        Of a parameter that is stored transposed they are columns, and the piece is [K, rows].

        Raises:
            ExportError: a value isn't finite, or too large for the type.
        """
        if self._is_int4(parameter):
            packed, scales = encode_int4(parameter, rows)
            return packed ^ self.int4_mask, scales
        stored = ENCODERS[self.tag](parameter, rows)
        return (transposed(stored) if self.is_transposed(parameter) else stored,)

    def is_transposed(self, parameter: str) -> bool:
        """Whether a parameter is stored as the transpose of what the decoder holds."""
        return self.transposed and parameter.endswith(PRODUCTS)

    def _is_int4(self, parameter: str) -> bool:
        return self.int4 and parameter.endswith(PRODUCTS)


def store(precision: Precision, tensors: Iterable[tuple[str, Rows]]) -> Iterator[tuple[str, Piece]]:
    """Parameters as ``write_weights`` takes them, one block of rows after the other.

    Args:
        precision: the recipe.
        tensors: parameters and RoPE tables in the decoder's order.
    """
    return in_file_order(precision, _encoded(precision, tensors))


def in_file_order(
    precision: Precision, blocks: Iterable[tuple[str, tuple[Piece, ...]]]
) -> Iterator[tuple[str, Piece]]:
    """Encoded blocks of rows as ``write_weights`` takes them.

    What a parameter has beside its values (scales, which are small) is kept until these are out. A
    parameter that is stored transposed is kept whole, encoded, for its rows lie across all blocks.

    Args:
        precision: whose ``encode`` made the blocks.
        blocks: parameter and pieces, rows in order.
    """
    for parameter, group in groupby(blocks, key=itemgetter(0)):
        if precision.is_transposed(parameter):
            yield from ((parameter, rows) for rows in _joined_rows([p for _, (p,) in group]))
            continue
        first, *others = precision.stored_names(parameter)
        kept: list[tuple[Piece, ...]] = []
        for _, (values, *beside) in group:
            yield first, values
            kept.append(tuple(beside))
        for name, pieces in zip(others, zip(*kept, strict=True), strict=True):
            yield name, np.concatenate(pieces)


def _encoded(
    precision: Precision, tensors: Iterable[tuple[str, Rows]]
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    """Blocks of rows, encoded."""
    for name, tensor in tensors:
        for start, count in row_blocks(tensor.shape):
            yield name, precision.encode(name, tensor[start : start + count])
        del tensor  # before the next is read


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each block of a tensor."""
    columns = shape[1] if len(shape) > 1 else 1
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, shape[0], step):
        yield start, min(step, shape[0] - start)


def _joined_rows(columns: list[Piece]) -> Iterator[Piece]:
    """Blocks of rows of a matrix that is given as blocks of columns, from the first on."""
    shape = len(columns[0]), sum(piece.shape[1] for piece in columns)
    for start, count in row_blocks(shape):
        yield np.concatenate([piece[start : start + count] for piece in columns], axis=1)
