"""The header of a GGUF file: metadata, and where each tensor lies.

A reader of our own, because the ``gguf`` package's makes objects for each of a tokenizer's 100,000
strings (seconds) and trusts counts and offsets. Here every number is checked against a limit and
the size of the file before it is used, so a hostile file is one error.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np

from llama_decoder.errors import CheckpointError
from llama_decoder.fields import Fields, quoted

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 128 * 1024 * 1024  # Llama 3's is 8 MB
MAX_STRING_BYTES = 4 * 1024 * 1024  # the longest are chat templates
MAX_ELEMENTS = 2 * 1024 * 1024  # of all arrays together; Llama 3's have 540,000
MAX_TENSORS = 65_536
MAX_KEYS = 65_536
MAX_ALIGNMENT = 65_536
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

# Value types of the format: those of a fixed size as numpy spells them, then the other three.
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
BOOL, STRING, ARRAY = 7, 8, 9

SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        shape: row-major.
        type: how its values are stored, a ``gguf.GGMLQuantizationType``.
        offset: of its first byte in the file.
        num_bytes: its size.
    """

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says about itself.

    Attributes:
        metadata: key to value, as plain Python values.
        tensors: by name, in the order of the file.
    """

    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]


def read_header(file: memoryview) -> Header:
    """Reads and checks the header of a GGUF file.

    Args:
        file: all bytes of the file; only those of the header are touched.

    Raises:
        CheckpointError: the file is no GGUF, is damaged, or has a tensor type that isn't supported.
    """
    if bytes(file[:4]) != MAGIC:
        raise CheckpointError("it is not a GGUF file")
    cursor = _Cursor(file[:MAX_HEADER_BYTES])
    cursor.take(len(MAGIC))
    version = cursor.number("<u4")
    if version not in VERSIONS:
        raise CheckpointError(
            f"its GGUF version is {version}; only little-endian 2 and 3 are read: convert it anew"
        )
    num_tensors = cursor.count("tensors", MAX_TENSORS)
    num_keys = cursor.count("metadata keys", MAX_KEYS)
    metadata: dict[str, object] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"its metadata has {quoted(key)} twice")
        metadata[key] = cursor.value(cursor.number("<u4"))
    stored: dict[str, _Stored] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in stored:
            raise CheckpointError(f"it has two tensors of the name {quoted(name)}")
        stored[name] = cursor.tensor(name)
    alignment = _read_alignment(metadata)
    start = _round_up(cursor.position, alignment)
    return Header(metadata, _lay_out(stored, start, alignment, len(file)))


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor as the header describes it: unchecked."""

    shape: tuple[int, ...]
    type: int
    offset: int


class _Cursor:
    """Reads the values of the format one after the other, never past the end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._elements = 0
        self.position = 0

    def take(self, num_bytes: int) -> memoryview:
        self.require(num_bytes)
        taken = self._data[self.position : self.position + num_bytes]
        self.position += num_bytes
        return taken

    def require(self, num_bytes: int) -> None:
        if self.position + num_bytes > len(self._data):
            raise CheckpointError(
                f"its header is damaged: a value at byte {self.position} has {num_bytes} bytes, "
                f"and the header ends at {len(self._data)} at most"
            )

    def number(self, dtype: str) -> int:
        return int(np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0])

    def length(self) -> int:
        value: int = struct.unpack("<Q", self.take(8))[0]
        return value

    def count(self, what: str, limit: int) -> int:
        value = self.length()
        if value > limit:
            raise CheckpointError(f"its header counts {value} {what}; the limit is {limit}")
        return value

    def string(self) -> str:
        size = self.length()
        self.require(size)
        if size > MAX_STRING_BYTES:
            raise CheckpointError(
                f"a string of its header has {size} bytes; the limit is {MAX_STRING_BYTES}"
            )
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"a string of its header is not UTF-8: {error.reason}") from error

    def value(self, kind: int) -> object:
        if kind != ARRAY:
            return self.values(kind, 1)[0]
        return self.values(self.number("<u4"), self.length())

    def values(self, kind: int, count: int) -> list[object]:
        if kind not in NUMBERS and kind not in (BOOL, STRING):
            raise CheckpointError(f"its metadata has a value or an array of type {kind}")
        dtype = np.dtype(NUMBERS.get(kind, "<u8" if kind == STRING else "<u1"))
        self.require(count * dtype.itemsize)  # of a string this is the length
        self._elements += count
        if self._elements > MAX_ELEMENTS:
            raise CheckpointError(
                f"the arrays of its header have {self._elements} elements or more; the limit is "
                f"{MAX_ELEMENTS}"
            )
        if kind == STRING:
            return [self.string() for _ in range(count)]
        if kind == BOOL:
            return [flag != 0 for flag in self.take(count)]
        values: list[object] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values

    def tensor(self, name: str) -> _Stored:
        num_dimensions = self.number("<u4")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(
                f"tensor {quoted(name)} has {num_dimensions} dimensions; it must have 1 to "
                f"{MAX_DIMENSIONS}"
            )
        dimensions = [self.length() for _ in range(num_dimensions)]
        if min(dimensions) < 1:
            raise CheckpointError(f"tensor {quoted(name)} has a dimension of 0")
        # The format lists the fastest dimension first.
        return _Stored(tuple(reversed(dimensions)), self.number("<u4"), self.length())


def _read_alignment(metadata: Mapping[str, object]) -> int:
    alignment = Fields(metadata, "the metadata").whole("general.alignment", DEFAULT_ALIGNMENT)
    if not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(
            f"general.alignment is {alignment}; it must be a power of two up to {MAX_ALIGNMENT}"
        )
    return alignment


def _lay_out(
    stored: Mapping[str, _Stored], start: int, alignment: int, file_size: int
) -> dict[str, TensorEntry]:
    """Turns offsets into places in the file; tensors must follow one another, as ggml demands."""
    _check_types(stored)
    entries: dict[str, TensorEntry] = {}
    expected = 0
    for name, tensor in stored.items():
        kind = gguf.GGMLQuantizationType(tensor.type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % block:
            raise CheckpointError(
                f"tensor {quoted(name)} has rows of {tensor.shape[-1]} values; {kind.name} needs a "
                f"multiple of {block}"
            )
        num_bytes = math.prod(tensor.shape) // block * block_bytes
        if tensor.offset != expected:
            raise CheckpointError(
                f"tensor {quoted(name)} is said to be at {tensor.offset}; it must follow the one "
                f"before it, at {expected}"
            )
        if start + expected + num_bytes > file_size:
            raise CheckpointError(
                f"tensor {quoted(name)} ends at byte {start + expected + num_bytes} and the file "
                f"at {file_size}: fetch the file again"
            )
        entries[name] = TensorEntry(tensor.shape, kind, start + expected, num_bytes)
        expected = _round_up(expected + num_bytes, alignment)
    return entries


def _check_types(stored: Mapping[str, _Stored]) -> None:
    known = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    names = {known.get(tensor.type, f"type {tensor.type}") for tensor in stored.values()}
    unsupported = sorted(names - set(SUPPORTED))
    if unsupported:
        raise CheckpointError(
            f"it has tensors of {', '.join(unsupported)}; only {', '.join(SUPPORTED)} are read: "
            "use another quantisation of the model"
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
