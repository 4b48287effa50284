"""Give a symbolic axis of an ONNX graph a size, without the package onnx.

TensorRT wants the capacity of a cache fixed before it parses a graph, and the exporter leaves it
open. All else in the file stays as it is, byte for byte.

The format: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama_runtime.errors import BackendError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

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
    return bytes(_rewritten(memoryview(graph), _MODEL, axis.encode(), size))


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
    for number, whole, content in _fields(message):
        if content is not None and number in fields:
            new = _rewritten(content, fields[number], axis, size)
            if new is not content:
                changed = True
                parts.append(_field(number, new))
                continue
        parts.append(whole)
    return b"".join(parts) if changed else message


def _dimension(message: memoryview, axis: bytes, size: int) -> bytes | memoryview:
    """A dimension; of several sizes and names the last one holds."""
    fields = list(_fields(message))
    choices = [content for number, _, content in fields if number in (_SIZE, _NAME)]
    if not choices or choices[-1] is None or choices[-1] != axis:
        return message
    rest = [whole for number, whole, _ in fields if number not in (_SIZE, _NAME)]
    return b"".join([_key(_SIZE, _VARINT), _number(size), *rest])


def _field(number: int, content: bytes | memoryview) -> bytes:
    return b"".join([_key(number, _BYTES), _number(len(content)), content])


def _key(number: int, wire: int) -> bytes:
    return _number(number << 3 | wire)


def _number(value: int) -> bytes:
    """A number, seven bits a byte, the lowest first."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | None]]:
    """The fields of a message: number, all of its bytes, and the content of one with a length."""
    position, end = 0, len(message)
    while position < end:
        start = position
        key, position = _read_number(message, position)
        wire = key & 7
        content = None
        if wire == _VARINT:
            _, position = _read_number(message, position)
        elif wire in (_FIXED32, _FIXED64):
            position += 4 if wire == _FIXED32 else 8
        elif wire == _BYTES:
            length, position = _read_number(message, position)
            content = message[position : position + length]
            position += length
        else:
            raise _broken()
        if position > end:
            raise _broken()
        yield key >> 3, message[start:position], content


def _read_number(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise _broken()


def _broken() -> BackendError:
    return BackendError("the graph is not an ONNX graph, or cut short: rebuild the bundle")
