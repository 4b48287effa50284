"""Write tensors one after another into a `.safetensors` file that a graph can point into.

The `safetensors` package writes a file from tensors that are all in memory. Here each tensor is
in memory only while it is written, so a bundle of any size is built in the space of its largest.
The result is an ordinary safetensors file, which the package reads back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from llama_export.errors import ExportError

ITEM_BYTES = 4  # float32 throughout: the CPU kernels compute in it
PAGE_BYTES = 4096  # where the data begins, so that a map of it is page-aligned


@dataclass(frozen=True, slots=True)
class Region:
    """Where one tensor lies in the file, in bytes from its start."""

    offset: int
    length: int


def weight_regions(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Region]:
    """Where ``write_weights`` puts each tensor."""
    regions, offset = {}, len(_header(shapes))
    for name, shape in shapes.items():
        regions[name] = Region(offset, ITEM_BYTES * prod(shape))
        offset += regions[name].length
    return regions


def weight_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of all tensors together."""
    return ITEM_BYTES * sum(prod(shape) for shape in shapes.values())


def write_weights(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[int]:
    """Write every tensor as float32, yielding the bytes written after each.

    Args:
        path: the file to make.
        shapes: name and shape of every tensor, in file order.
        tensors: the same names in the same order, each read when it is written.

    Raises:
        ExportError: the tensors are not those that ``shapes`` promised, or a value isn't finite.
    """
    with path.open("wb") as file:
        file.write(_header(shapes))
        written = 0
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            if (given, tuple(tensor.shape)) != (name, shape):
                raise ExportError(
                    f"expected the weights {name} {shape}, got {given} {tuple(tensor.shape)}"
                )
            contiguous = np.ascontiguousarray(tensor, dtype=np.float32)
            if not np.isfinite(contiguous).all():
                raise ExportError(f"the weights {name} hold values that are not finite numbers")
            file.write(contiguous.data)
            written += contiguous.nbytes
            yield written


def read_weights(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file by name, memory-mapped."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no mapping: iterating it fails
            yield name, file.get_tensor(name)


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + ITEM_BYTES * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(8 + len(text)) % PAGE_BYTES
    return (len(text) + padding).to_bytes(8, "little") + text + b" " * padding
