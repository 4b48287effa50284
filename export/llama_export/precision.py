"""In which numbers a bundle holds its weights: one recipe a precision.

A recipe says what type each parameter has in the weight file, and how float32 rows become the
stored bytes. Rows are stored in blocks, so the float32 form of a whole matrix and its stored form
need not be in memory together, and blocks may be made by several threads.

Shape letters are those of ``llama_runtime.contract``; the matrix of a product is [N, K] here, as
the operator MatMulNBits calls its rows and columns, and [K, N] where it is stored transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from llama_decoder.config import LlamaConfig
from llama_decoder.weights import parameter_shapes
from llama_export.errors import ExportError
from llama_export.host_weights import BLOCK, BlockWeights, Int8Weights, finer_matrices
from llama_export.passes_cache import cache_layout
from llama_export.weight_file import Piece, Stored, Tag
from llama_runtime.contract import MAX_CHUNK, PAGED, SLOTS, TENSORRT, Dialect, DType

INT4_BLOCK = 32  # columns that share a scale; the one block that `ep.cuda.fpa_intb_gemm` takes
INT4_ZERO = 8  # what stands for 0 where there are no zero points
TARGETS = {"cpu": SLOTS, "cuda": PAGED, "tensorrt": TENSORRT}
KV_SCALE = "kv_scale"  # the one number of an fp8 graph's own: float32 [1], and that is 1
# For which PagedAttention decodes from 8 bits in its fast kernel, if a KV head has 4, 6, 8, 16 or
# 32 query heads; slower kernels run if not.
FP8_HEAD_DIMS = (64, 128, 256)
PRODUCTS = (
    *("qkv_proj.weight", "o_proj.weight"),
    *("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
)

BLOCK_ELEMENTS = 1 << 20  # of the rows that are stored at once: 4 MB of float32
_CACHED_ELEMENTS = 1 << 16  # whose passes stay within a processor's cache

Rows = NDArray[np.floating[Any]]


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
        """What turns the bytes of ``quantise_int4`` into those that are stored, and back."""
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
                layout |= zip(int4_names(name), _int4_tensors(name, shape), strict=True)
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
            packed, scales = quantise_int4(parameter, rows)
            return packed ^ self.int4_mask, scales
        stored = _ENCODERS[self.tag](parameter, rows)
        return (_transpose(stored) if self.is_transposed(parameter) else stored,)

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
    blocks = (
        (name, precision.encode(name, tensor[start : start + count]))
        for name, tensor in tensors
        for start, count in row_blocks(tensor.shape)
    )
    return in_file_order(precision, blocks)


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


def int4_names(parameter: str) -> tuple[str, str]:
    """The two tensors that hold a parameter in 4 bits: values and scales."""
    return f"{parameter}.int4", f"{parameter}.scales"


def quantise_int4(parameter: str, rows: Rows) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Rows [N, K] in 4 bits, as com.microsoft.MatMulNBits takes them without zero points.

    Each block of 32 columns has a scale, which is its value of the largest magnitude over -8. The
    bytes are those of ONNX Runtime's ``quantize_matmul_4bits``, which isn't used because it wants
    the transpose, and starts threads of its own at every call.

    Returns:
        Values [N, K/32, 16], two in a byte, the first in its lower half; and scales [N, K/32].

    Raises:
        ExportError: K is no multiple of 32, a value isn't finite, or too large for an fp16 scale.
    """
    num_rows, columns = rows.shape
    shape = (num_rows, _int4_blocks(parameter, columns), INT4_BLOCK)
    values = _finite(parameter, rows).reshape(shape)
    highest, lowest = values.max(axis=2), values.min(axis=2)
    scales = np.where(highest > -lowest, highest, lowest) / np.float32(-INT4_ZERO)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    steps = values * inverse[..., None]
    steps += INT4_ZERO
    steps += np.float32(0.5)  # the cast cuts it off, and with it rounds
    np.clip(steps, 0, 15, out=steps)
    digits = steps.astype(np.uint8)
    packed = digits[..., 1::2] << 4
    packed |= digits[..., 0::2]
    return packed, _to_float16(parameter, scales)


def dequantise_int4(packed: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """The float32 rows [N, K] that ``quantise_int4`` stands for."""
    num_rows = len(packed)
    values = np.empty((num_rows, packed.shape[1], INT4_BLOCK), np.float32)
    values[..., 0::2] = packed & 15
    values[..., 1::2] = packed >> 4
    values -= INT4_ZERO
    values *= scales.astype(np.float32)[..., None]
    return values.reshape(num_rows, -1)


def _int4_tensors(parameter: str, shape: tuple[int, ...]) -> tuple[Stored, Stored]:
    rows, columns = shape
    blocks = _int4_blocks(parameter, columns)
    return Stored("U8", (rows, blocks, INT4_BLOCK // 2)), Stored("F16", (rows, blocks))


def _int4_blocks(parameter: str, columns: int) -> int:
    if columns % INT4_BLOCK:
        raise ExportError(
            f"{parameter} has {columns:,} columns, which is no multiple of {INT4_BLOCK}: int4 "
            "can't store it, build with --precision fp16"
        )
    return columns // INT4_BLOCK


def _finite(parameter: str, rows: Rows) -> NDArray[np.float32]:
    values = np.ascontiguousarray(rows, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ExportError(f"the weights {parameter} hold values that are not finite numbers")
    return values


def _to_float32(_: str, rows: Rows) -> NDArray[np.float32]:
    return np.ascontiguousarray(rows, dtype=np.float32)  # ``write_weights`` looks at them


def _to_float16(parameter: str, rows: Rows) -> NDArray[np.float16]:
    values = _finite(parameter, rows)
    with np.errstate(over="ignore"):  # told below, and with the name
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise ExportError(
            f"the weights {parameter} reach {np.abs(values).max():,.0f}, and fp16 ends at 65,504: "
            "build with --precision bf16"
        )
    return halves


def _to_bfloat16(parameter: str, rows: Rows) -> NDArray[np.uint16]:
    """The upper halves of the bits, rounded to the nearest, of two as near to the even one."""
    values = _finite(parameter, rows)
    bits = values.reshape(-1).view(np.uint32)
    upper = np.empty(bits.shape, np.uint16)
    for start in range(0, len(bits), _CACHED_ELEMENTS):
        part = bits[start : start + _CACHED_ELEMENTS]
        rounded = part >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += part
        rounded >>= 16
        upper[start : start + _CACHED_ELEMENTS] = rounded
    if (upper & 0x7FFF == 0x7F80).any():
        raise ExportError(f"the weights {parameter} hold values too large for bf16")
    return upper.reshape(values.shape)


def _transpose(block: Piece) -> Piece:
    """The transpose of a block of 16-bit elements, in its own memory.

    By torch, which goes by tiles: 1.3 to 3.6 GB/s on one thread where numpy makes 0.7.
    """
    turned = torch.from_numpy(block.view(np.int16)).t().contiguous()
    return turned.numpy().view(block.dtype)


_ENCODERS: dict[Tag, Callable[[str, Rows], Piece]] = {
    "F32": _to_float32,
    "F16": _to_float16,
    "BF16": _to_bfloat16,
}
