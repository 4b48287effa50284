"""Messages of protocol buffers, read and written as bytes: an ONNX file is one.

A message is a row of numbered fields; the key of each says how its value is written. Standard
library only. The format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class MessageError(ValueError):
    """The bytes are no message, or are cut short."""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: which it is.
        value: a whole number, or the bytes of anything else.
        has_length: whether it is bytes of any number: a text, a message or a packed list.
        whole: all of its bytes, from its key on.
    """

    number: int
    value: int | memoryview
    has_length: bool
    whole: memoryview


def read_fields(message: memoryview) -> Iterator[Field]:
    """The fields of a message, in their order.

    Raises:
        MessageError: it is none.
    """
    position, end = 0, len(message)
    while position < end:
        start = position
        key, position = read_number(message, position)
        number, wire = key >> 3, key & 7
        value: int | memoryview
        if wire == _VARINT:
            value, position = read_number(message, position)
        else:
            if wire == _BYTES:
                size, position = read_number(message, position)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise MessageError(f"a field is of the unknown kind {wire}")
            if size > end - position:
                raise MessageError("it is cut short")
            value = message[position : position + size]
            position += size
        yield Field(number, value, wire == _BYTES, message[start:position])


def read_number(message: memoryview, position: int) -> tuple[int, int]:
    """A number, seven bits a byte, the lowest first, and the position behind it.

    Raises:
        MessageError: there is none.
    """
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise MessageError("it is cut short, or a number is too long")


def number_field(number: int, value: int) -> bytes:
    """A field that is a whole number, not negative."""
    return _written(number << 3 | _VARINT) + _written(value)


def bytes_field(number: int, value: bytes | memoryview) -> bytes:
    """A field that is bytes: a text, a message or a packed list."""
    return b"".join([_written(number << 3 | _BYTES), _written(len(value)), value])


def _written(value: int) -> bytes:
    """A number, seven bits a byte, the lowest first; all but the last have their high bit set."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
