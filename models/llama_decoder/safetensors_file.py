"""The weights of a Hugging Face directory: safetensors, in one file or in several with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from llama_decoder.errors import CheckpointError
from llama_decoder.fields import quoted
from llama_decoder.source_files import NEEDS_SAFETENSORS, PICKLES, read_json, refuse_disguise
from llama_decoder.weights import Array, listed

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TYPES = ("F32", "F16", "BF16")


class SafetensorsWeights:
    """Every tensor of a directory, memory-mapped.

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
        self._handles: dict[str, Any] = {}  # safe_open; its stub has no annotations
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
        """One tensor as the file has it, a private map of it."""
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return tensor

    def read(self, name: str) -> Array:
        """One tensor as writable float32; a private map of the file where it is float32 there."""
        value: Array = self.tensor(name).to(torch.float32).numpy()
        return value

    def _open(self, path: Path) -> list[str]:
        """Maps one file and returns the names of its tensors."""
        refuse_disguise(path)
        try:
            handle: Any = safetensors.safe_open(path, framework="pt")
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
        others = [
            f"{quoted(name)} is {tensor.get_dtype()}"
            for name, tensor in slices.items()
            if tensor.get_dtype() not in TYPES
        ]
        if others:
            raise CheckpointError(
                f"{path} has {listed('tensors of unsupported types', others)}; only "
                f"{', '.join(TYPES)} are read: use the checkpoint that isn't quantised"
            )
        self.files.append(path)
        for name, tensor in slices.items():
            self._shapes[name] = tuple(tensor.get_shape())
            self._handles[name] = handle
        return list(slices)

    def _open_indexed(self, index: Path) -> None:
        """Maps the files of an index, which must say exactly what they hold."""
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
