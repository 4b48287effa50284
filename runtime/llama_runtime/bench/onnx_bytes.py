"""Graphs of one product, written by hand: the runtime can't use the package onnx."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llama_runtime.protocol_buffers import bytes_field, number_field

FLOAT, UINT8, INT8, INT32, FLOAT16 = 1, 2, 3, 6, 10  # as ONNX numbers its types
_IR_VERSION, _OPSET = 10, 21


def float_product(rows: int, matrix: npt.NDArray[np.float32]) -> bytes:
    """``MatMul`` of a, [rows, K] float32, and a constant [K, N]."""
    return _product("MatMul", FLOAT, FLOAT, FLOAT, rows, matrix)


def half_product(rows: int, matrix: npt.NDArray[np.float16]) -> bytes:
    """``MatMul`` of a, [rows, K] float16, and a constant [K, N]."""
    return _product("MatMul", FLOAT16, FLOAT16, FLOAT16, rows, matrix)


def byte_product(rows: int, matrix: npt.NDArray[np.int8]) -> bytes:
    """``MatMulInteger`` of a, [rows, K] uint8, and a constant [K, N]; its sums are int32."""
    return _product("MatMulInteger", UINT8, INT8, INT32, rows, matrix)


def _product(
    operator: str, left: int, right: int, result: int, rows: int, matrix: npt.NDArray[np.generic]
) -> bytes:
    depth, columns = matrix.shape
    node = _text(1, "a") + _text(1, "b") + _text(2, "y") + _text(4, operator)
    constant = (
        number_field(1, depth)
        + number_field(1, columns)
        + number_field(2, right)
        + _text(8, "b")
        + bytes_field(9, np.ascontiguousarray(matrix).tobytes())
    )
    graph = (
        bytes_field(1, node)
        + _text(2, "product")
        + bytes_field(5, constant)
        + bytes_field(11, _value("a", left, rows, depth))
        + bytes_field(12, _value("y", result, rows, columns))
    )
    opset = number_field(2, _OPSET)
    return number_field(1, _IR_VERSION) + bytes_field(7, graph) + bytes_field(8, opset)


def _value(name: str, kind: int, *dimensions: int) -> bytes:
    """What an input or output is."""
    shape = b"".join(bytes_field(1, number_field(1, size)) for size in dimensions)
    tensor = number_field(1, kind) + bytes_field(2, shape)
    return _text(1, name) + bytes_field(2, bytes_field(1, tensor))


def _text(field: int, value: str) -> bytes:
    return bytes_field(field, value.encode())
