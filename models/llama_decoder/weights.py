"""From a checkpoint's tensors to the decoder's parameters, strict both ways.

Before any value is read, every missing, unexpected or misshapen tensor is listed. Then one
parameter after the other is read, so that no more than one and a part of it are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama_decoder import names
from llama_decoder.config import LlamaConfig
from llama_decoder.errors import CheckpointError
from llama_decoder.fields import quoted

Array = NDArray[np.float32]
Number = TypeVar("Number", bound=np.generic)
SourceFormat = Literal["safetensors", "gguf"]

LISTED = 8  # tensors named in a message before it says how many more there are


class TensorSource(Protocol):
    """An opened checkpoint, whatever its format."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, row-major, known without reading values."""

    def read(self, name: str) -> Array:
        """One tensor as writable float32; may be a private map of the file."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor that a checkpoint must have.

    Attributes:
        name: its name in the checkpoint.
        shape: row-major.
        interleaved_heads: heads whose rows are interleaved; 0 where rows are as they should be.
    """

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the decoder.

    Attributes:
        name: as in ``llama_decoder.names``.
        shape: row-major.
        parts: what it is made of, one below the other.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[SourceTensor, ...]


def parameter_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the decoder and its shape, in the decoder's order."""
    return {parameter.name: parameter.shape for parameter in parameters(config, "safetensors")}


def parameters(config: LlamaConfig, source_format: SourceFormat) -> list[Parameter]:
    """Every parameter of the decoder, in its order, and what a checkpoint must have for it."""
    layers = [(row, i) for i in range(config.num_layers) for row in names.LAYER]
    last = names.LAST if config.tie_embeddings else names.LAST + names.UNTIED
    rows = [*((row, 0) for row in names.FIRST), *layers, *((row, 0) for row in last)]
    sizes = _sizes(config)
    return [_parameter(row, i, sizes, source_format) for row, i in rows]


def check_tensors(
    expected: Sequence[Parameter], shapes: Mapping[str, tuple[int, ...]], *, harmless: set[str]
) -> None:
    """Compares the tensors a checkpoint has with those it must have.

    Args:
        expected: the decoder's parameters.
        shapes: the checkpoint's tensors.
        harmless: tensors that may be there beside them.

    Raises:
        CheckpointError: names what is missing, unexpected or misshapen.
    """
    wanted = {part.name: part.shape for parameter in expected for part in parameter.parts}
    missing = [name for name in wanted if name not in shapes]
    extra = [quoted(name) for name in sorted(shapes.keys() - wanted.keys() - harmless)]
    misshapen = [
        f"{name} is {list(shapes[name])} and must be {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    groups = {"missing": missing, "unexpected": extra, "misshapen": misshapen}
    problems = [listed(what, found) for what, found in groups.items() if found]
    if problems:
        raise CheckpointError(
            f"the tensors don't fit the configuration: {'; '.join(problems)}; "
            "use a complete checkpoint of a plain Llama"
        )


def listed(what: str, found: Sequence[str]) -> str:
    """A count, what it counts, and the first of them by name."""
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return f"{len(found)} {what} ({', '.join(found[:LISTED])}{more})"


def stream(expected: Sequence[Parameter], source: TensorSource) -> Iterator[tuple[str, Array]]:
    """Reads one parameter after the other.

    Args:
        expected: the parameters, checked against the source.
        source: where their parts are.

    Yields:
        The name and the value, writable float32. It isn't kept here.
    """
    for parameter in expected:
        yield parameter.name, _read(parameter, source)


def separate(rows: NDArray[Number], num_heads: int) -> NDArray[Number]:
    """Undoes the row order that llama.cpp's converter gives to q and k.

    The converter takes rows d and d + D/2 of a head, which RoPE turns together, and puts them side
    by side (``LlamaModel.permute`` in ``convert_hf_to_gguf.py``). The decoder has them as halves.

    Args:
        rows: [num_heads * D, E], interleaved.
        num_heads: H for q, K for k.

    Returns:
        [num_heads * D, E], each head's first halves above its second halves.
    """
    pairs = rows.reshape(num_heads, -1, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _read(parameter: Parameter, source: TensorSource) -> Array:
    if len(parameter.parts) == 1:
        return _read_part(parameter.parts[0], source)
    value = np.empty(parameter.shape, np.float32)
    start = 0
    for part in parameter.parts:
        stop = start + part.shape[0]
        value[start:stop] = _read_part(part, source)
        start = stop
    return value


def _read_part(part: SourceTensor, source: TensorSource) -> Array:
    value = source.read(part.name)
    return separate(value, part.interleaved_heads) if part.interleaved_heads else value


def _sizes(config: LlamaConfig) -> dict[str, int]:
    """The number behind each letter of ``llama_decoder.names``."""
    return {
        "V": config.vocab_size,
        "E": config.hidden_size,
        "I": config.intermediate_size,
        "H": config.num_heads,
        "K": config.num_kv_heads,
        "Q": config.num_heads * config.head_dim,
        "U": config.num_kv_heads * config.head_dim,
    }


def _parameter(
    row: names.Row, layer: int, sizes: Mapping[str, int], source_format: SourceFormat
) -> Parameter:
    columns = (sizes[row.columns],) if row.columns else ()
    is_gguf = source_format == "gguf"
    parts = tuple(
        SourceTensor(
            name=(part.gguf if is_gguf else part.huggingface).format(i=layer),
            shape=(sizes[part.rows], *columns),
            interleaved_heads=sizes[part.interleaved] if is_gguf and part.interleaved else 0,
        )
        for part in row.parts
    )
    num_rows = sum(part.shape[0] for part in parts)
    return Parameter(row.name.format(i=layer), (num_rows, *columns), parts)
