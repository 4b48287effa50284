"""From rows of float32 to the bytes that a weight file holds: 16-bit floats, and 4-bit blocks.

The 4-bit blocks are those of GPUs; ``quantise`` makes what a CPU is given.

Shape letters: the matrix of a product is [N, K], as the operator MatMulNBits calls its rows and
columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llama_export.errors import ExportError
from llama_export.weight_file import Piece, Stored, Tag

INT4_BLOCK = 32  # columns that share a scale; the one block that `ep.cuda.fpa_intb_gemm` takes
INT4_ZERO = 8  # what stands for 0 where there are no zero points
_CACHED_ELEMENTS = 1 << 16  # whose passes stay within a processor's cache

Rows = NDArray[np.floating[Any]]


def int4_names(parameter: str) -> tuple[str, str]:
    """The two tensors that hold a parameter in 4 bits: values and scales."""
    return f"{parameter}.int4", f"{parameter}.scales"


def encode_int4(parameter: str, rows: Rows) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
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


def decode_int4(packed: NDArray[np.uint8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """The float32 rows [N, K] that ``encode_int4`` stands for."""
    num_rows = len(packed)
    values = np.empty((num_rows, packed.shape[1], INT4_BLOCK), np.float32)
    values[..., 0::2] = packed & 15
    values[..., 1::2] = packed >> 4
    values -= INT4_ZERO
    values *= scales.astype(np.float32)[..., None]
    return values.reshape(num_rows, -1)


def int4_tensors(parameter: str, shape: tuple[int, ...]) -> tuple[Stored, Stored]:
    """What ``int4_names`` are of a parameter [N, K].

    Raises:
        ExportError: K is no multiple of 32.
    """
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


def transposed(block: Piece) -> Piece:
    """The transpose of a block of 16-bit elements, in its own memory.

    By torch, which goes by tiles: 1.3 to 3.6 GB/s on one thread where numpy makes 0.7.
    """
    turned = torch.from_numpy(block.view(np.int16)).t().contiguous()
    return turned.numpy().view(block.dtype)


ENCODERS: dict[Tag, Callable[[str, Rows], Piece]] = {
    "F32": _to_float32,
    "F16": _to_float16,
    "BF16": _to_bfloat16,
}
