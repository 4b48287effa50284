"""Give a symbolic axis of an ONNX graph a size, without the package onnx.

TensorRT wants the capacity of a cache fixed before it parses a graph, and the exporter leaves it
open. All else in the file stays as it is, byte for byte.

The format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from typing import Any

from llama_runtime.errors import BackendError
from llama_runtime.protocol_buffers import MessageError, bytes_field, number_field, read_fields

# The fields that lead from a model to its dimensions: of the graph the inputs, the outputs and the
# values between; of each its type, the type of a tensor, its shape, and the dimensions.
_DIMENSION: dict[int, Any] = {}
_VALUE = {2: {1: {2: {1: _DIMENSION}}}}
_MODEL = {7: {11: _VALUE, 12: _VALUE, 13: _VALUE}}
_SIZE, _NAME = 1, 2  # of a dimension, which has one of them


def with_static_axis(graph: bytes, axis: str, size: int) -> bytes:
    """The same graph with one axis of a fixed size.

    Args:
        graph: an ONNX file.
        axis: its name; a graph without it is given back as it is.
        size: 1 or more.

    Raises:
        BackendError: the file isn't an ONNX graph.
    """
    try:
        return bytes(_rewritten(memoryview(graph), _MODEL, axis.encode(), size))
    except MessageError as error:
        raise BackendError(
            f"the graph is not an ONNX graph: {error}; rebuild the bundle with llama-export build"
        ) from error


def _rewritten(
    message: memoryview, fields: dict[int, Any], axis: bytes, size: int
) -> bytes | memoryview:
    """A message, itself if nothing changes.

    Args:
        message: its bytes.
        fields: those that lead to dimensions.
        axis: the name to look for.
        size: what takes its place.
    """
    if fields is _DIMENSION:
        return _dimension(message, axis, size)
    parts: list[bytes | memoryview] = []
    changed = False
    for number, value, has_length, whole in read_fields(message):
        if isinstance(value, memoryview) and has_length and number in fields:
            new = _rewritten(value, fields[number], axis, size)
            if new is not value:
                changed = True
                parts.append(bytes_field(number, new))
                continue
        parts.append(whole)
    return b"".join(parts) if changed else message


def _dimension(message: memoryview, axis: bytes, size: int) -> bytes | memoryview:
    """A dimension; of several sizes and names the last one holds."""
    fields = list(read_fields(message))
    choices = [field.value for field in fields if field.number in (_SIZE, _NAME)]
    if not choices or isinstance(choices[-1], int) or choices[-1] != axis:
        return message
    rest = [field.whole for field in fields if field.number not in (_SIZE, _NAME)]
    return b"".join([number_field(_SIZE, size), *rest])
