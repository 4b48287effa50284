"""The weights of a Hugging Face directory: safetensors, in one file or in several with an index.

A tensor has a map of its own, which goes when the tensor goes. The maps of the ``safetensors``
package are of whole files: pages that were read from them count as resident as long as one of the
file's tensors is used, or the file is open, so streaming a model would end with all of it there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch

from llama_decoder.errors import CheckpointError
from llama_decoder.fields import quoted
from llama_decoder.source_files import NEEDS_SAFETENSORS, PICKLES, read_json, refuse_disguise
from llama_decoder.weights import Array, listed

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Version:
    """What changes when somebody writes to a file."""

    size: int
    modified_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> _Version:
        return cls(stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: bytes from the start of a file, as it was when its header was read."""

    path: Path
    version: _Version
    offset: int
    length: int
    dtype: torch.dtype


class SafetensorsWeights:
    """Every tensor of a directory, memory-mapped while it is used.

    Args:
        directory: holds ``model.safetensors``, or the index and the files it names.

    Attributes:
        files: what was opened, the index among them.

    Raises:
        CheckpointError: there is no safetensors file, one can't be read, the index doesn't say
            what the files hold, or an element type is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self.files: list[Path] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, _Place] = {}
        if (directory / SINGLE).is_file():  # as transformers, which looks for the index second
            self._open(directory / SINGLE)
        elif (directory / INDEX).is_file():
            self._open_indexed(directory / INDEX)
        else:
            raise CheckpointError(_why_nothing_opens(directory))

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, row-major."""
        return self._shapes

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as the file has it, a private map of it.

        Raises:
            CheckpointError: the file can't be read, or has changed since it was opened.
        """
        place = self._places[name]
        try:
            with place.path.open("rb") as file:
                if _Version.of(os.fstat(file.fileno())) != place.version:
                    raise CheckpointError(
                        f"{place.path} has changed since it was opened; start again when it is "
                        "complete"
                    )
                mapped = np.memmap(file, np.uint8, "c", place.offset, (place.length,))
        except OSError as error:
            raise CheckpointError(f"{place.path} can't be read: {error.strerror}") from error
        stored = torch.from_numpy(mapped.view(np.ndarray))
        return stored.view(place.dtype).view(self._shapes[name])

    def read(self, name: str) -> Array:
        """One tensor as writable float32; a private map of the file where it is float32 there."""
        value: Array = self.tensor(name).to(torch.float32).numpy()
        return value

    def _open(self, path: Path) -> list[str]:
        """Notes where the tensors of one file lie and returns their names."""
        refuse_disguise(path)
        try:
            version = _Version.of(path.stat())
            handle: Any  # its stub has no annotations
            with safetensors.safe_open(path, framework="pt") as handle:
                slices = {name: handle.get_slice(name) for name in handle.offset_keys()}
                types = {name: tensor.get_dtype() for name, tensor in slices.items()}
                shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
        others = [f"{quoted(name)} is {said}" for name, said in types.items() if said not in TYPES]
        if others:
            raise CheckpointError(
                f"{path} has {listed('tensors of unsupported types', others)}; only "
                f"{', '.join(TYPES)} are read: use the checkpoint that isn't quantised"
            )
        self.files.append(path)
        self._shapes |= shapes
        # The package has made sure that the tensors follow one another, up to the end of the file.
        lengths = {name: prod(shapes[name]) * TYPES[said].itemsize for name, said in types.items()}
        offset = version.size - sum(lengths.values())
        for name, length in lengths.items():
            self._places[name] = _Place(path, version, offset, length, TYPES[types[name]])
            offset += length
        return list(lengths)

    def _open_indexed(self, index: Path) -> None:
        """Opens the files of an index, which must say exactly what they hold."""
        weight_map = read_json(index).get("weight_map")
        self.files.append(index)
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map, which says where each tensor is")
        stated = {(name, _plain_name(file, index)) for name, file in weight_map.items()}
        held: set[tuple[str, str]] = set()
        for file in sorted({file for _, file in stated}):
            held.update((name, file) for name in self._open(index.parent / file))
        differing = sorted(f"{quoted(name)} of {quoted(file)}" for name, file in stated ^ held)
        if differing:
            raise CheckpointError(
                f"{index} and the files it names disagree about {listed('tensors', differing)}; "
                "fetch the checkpoint again"
            )


def _plain_name(file: object, index: Path) -> str:
    """A file beside the index, and nothing else."""
    if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
        raise CheckpointError(
            f"{index} names {quoted(file)}; it may only name .safetensors files beside it"
        )
    return file


def _why_nothing_opens(directory: Path) -> str:
    if any(path.suffix.lower() in PICKLES for path in directory.iterdir()):
        return f"{directory} holds its weights as pickles only: {NEEDS_SAFETENSORS}"
    return f"{directory} has neither {SINGLE} nor {INDEX}"
