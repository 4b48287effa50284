"""Write tensors one after another into a `.safetensors` file that a graph can point into.

The `safetensors` package writes a file from tensors that are all in memory. Here a tensor, or a
piece of its rows, is in memory only while it is written, so a bundle of any size is built in the
space of its largest tensor. The result is an ordinary safetensors file, which the package reads
back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from llama_export.errors import ExportError

WEIGHT_FILE = "model.safetensors"  # its name in a bundle
PAGE_BYTES = 4096  # where the data begins, so that a map of it is page-aligned

Tag = Literal["F32", "F16", "BF16", "U8", "I8"]  # element types as a safetensors file names them
Piece = NDArray[Any]

# How numpy holds an element; it has no bfloat16, whose bits are the upper half of a float32.
NUMPY_TYPES: dict[Tag, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U8": np.uint8,
    "I8": np.int8,
}


class Stored(NamedTuple):
    """What one tensor of the file is: its element type and shape, row-major."""

    tag: Tag
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return np.dtype(NUMPY_TYPES[self.tag]).itemsize * prod(self.shape)


Layout = Mapping[str, Stored]  # every tensor by name, in file order


@dataclass(frozen=True, slots=True)
class Region:
    """Where one tensor lies in the file, in bytes from its start, and what it is."""

    offset: int
    length: int
    stored: Stored


def float32_layout(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """The layout of tensors of these shapes, all in float32."""
    return {name: Stored("F32", tuple(shape)) for name, shape in shapes.items()}


def weight_regions(layout: Layout) -> dict[str, Region]:
    """Where ``write_weights`` puts each tensor."""
    regions, offset = {}, len(_header(layout))
    for name, stored in layout.items():
        regions[name] = Region(offset, stored.num_bytes, stored)
        offset += stored.num_bytes
    return regions


def weight_bytes(layout: Layout) -> int:
    """Bytes of all tensors together."""
    return sum(stored.num_bytes for stored in layout.values())


def write_weights(path: Path, layout: Layout, pieces: Iterable[tuple[str, Piece]]) -> Iterator[int]:
    """Write every tensor, yielding the bytes written after each piece.

    Args:
        path: the file to make.
        layout: every tensor, in file order.
        pieces: the same names in the same order, each read when it is written: a tensor whole, or
            its rows in several pieces, from the first row on. Elements are as ``NUMPY_TYPES`` says;
            those of an ``F32`` tensor may be of any type of numbers.

    Raises:
        ExportError: the tensors are not those that ``layout`` promised, or a value isn't finite.
    """
    given = iter(pieces)
    with path.open("wb") as file:
        file.write(_header(layout))
        written = 0
        for name, stored in layout.items():
            rows = 0
            while rows < stored.shape[0]:
                piece = _checked(name, stored, rows, next(given, None))
                file.write(piece.data)
                rows += len(piece)
                written += piece.nbytes
                yield written
    extra = next(given, None)
    if extra is not None:
        raise ExportError(f"expected no more weights, got {extra[0]}")


def read_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file by name, memory-mapped, in file order."""
    with safe_open(path, framework="pt") as file:
        for name in stored_layout(path):
            yield name, file.get_tensor(name)


def stored_layout(path: Path) -> dict[str, Stored]:
    """What a file that ``write_weights`` made says about itself, in file order.

    Raises:
        ExportError: it isn't such a file, or has been cut short.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= path.stat().st_size else b""
    try:
        layout = {
            name: Stored(entry["dtype"], tuple(entry["shape"]))
            for name, entry in json.loads(text).items()
        }
        whole = len(_header(layout)) + weight_bytes(layout)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is not a weight file of a bundle: {error}") from error
    if path.stat().st_size != whole:
        raise ExportError(f"{path} has {path.stat().st_size:,} bytes, its tensors need {whole:,}")
    return layout


def _checked(name: str, stored: Stored, rows: int, given: tuple[str, Piece] | None) -> Piece:
    """The next piece as it is written, if it is the one that the layout promised."""
    if given is None:
        raise ExportError(f"expected the weights {name} {stored.shape}, got no more")
    given_name, piece = given
    fits = (given_name, tuple(piece.shape[1:])) == (name, stored.shape[1:])
    if not fits or not 0 < len(piece) <= stored.shape[0] - rows:
        raise ExportError(
            f"expected the weights {name} {stored.shape}, got {given_name} {tuple(piece.shape)}"
        )
    if stored.tag == "F32":
        piece = np.ascontiguousarray(piece, dtype=np.float32)
        if not np.isfinite(piece).all():
            raise ExportError(f"the weights {name} hold values that are not finite numbers")
    if piece.dtype != NUMPY_TYPES[stored.tag]:
        raise ExportError(f"expected the weights {name} as {stored.tag}, got {piece.dtype}")
    return np.ascontiguousarray(piece)


def _header(layout: Layout) -> bytes:
    entries, offset = {}, 0
    for name, stored in layout.items():
        end = offset + stored.num_bytes
        entries[name] = {
            "dtype": stored.tag,
            "shape": list(stored.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(8 + len(text)) % PAGE_BYTES
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding
