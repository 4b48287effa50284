"""Graphs of one product, written by hand: the runtime can't use the package onnx.

An ONNX file is a message of protocol buffers, which is numbered fields: whole numbers, and bytes
with their length before them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6  # as ONNX numbers its types
_IR_VERSION, _OPSET = 10, 21


def float_product(rows: int, matrix: npt.NDArray[np.float32]) -> bytes:
    """``MatMul`` of a, [rows, K] float32, and a constant [K, N]."""
    return _product("MatMul", FLOAT, FLOAT, FLOAT, rows, matrix)


def byte_product(rows: int, matrix: npt.NDArray[np.int8]) -> bytes:
    """``MatMulInteger`` of a, [rows, K] uint8, and a constant [K, N]; its sums are int32."""
    return _product("MatMulInteger", UINT8, INT8, INT32, rows, matrix)


def _product(
    operator: str, left: int, right: int, result: int, rows: int, matrix: npt.NDArray[np.generic]
) -> bytes:
    depth, columns = matrix.shape
    node = _text(1, "a") + _text(1, "b") + _text(2, "y") + _text(4, operator)
    constant = (
        _number(1, depth)
        + _number(1, columns)
        + _number(2, right)
        + _text(8, "b")
        + _field(9, np.ascontiguousarray(matrix).tobytes())
    )
    graph = (
        _field(1, node)
        + _text(2, "product")
        + _field(5, constant)
        + _field(11, _value("a", left, rows, depth))
        + _field(12, _value("y", result, rows, columns))
    )
    return _number(1, _IR_VERSION) + _field(7, graph) + _field(8, _number(2, _OPSET))


def _value(name: str, kind: int, *dimensions: int) -> bytes:
    """What an input or output is."""
    shape = b"".join(_field(1, _number(1, size)) for size in dimensions)
    return _text(1, name) + _field(2, _field(1, _number(1, kind) + _field(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _field(field, value.encode())


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have their high bit set."""
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
