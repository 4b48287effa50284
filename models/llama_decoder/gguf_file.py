"""The weights of a GGUF file, memory-mapped and dequantised one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from llama_decoder.config import MAX_HEAD_DIM
from llama_decoder.errors import CheckpointError
from llama_decoder.gguf_blocks import BLOCK_TYPES, Blocks, BlockType, read_blocks
from llama_decoder.gguf_header import TensorEntry, read_header
from llama_decoder.source_files import refuse_disguise
from llama_decoder.weights import Array

ROPE_FACTORS = "rope_freqs.weight"
OUTPUT = "output.weight"
SLAB = 1 << 20  # values dequantised at once, since gguf keeps a second copy of what it returns


class GgufWeights:
    """Every tensor of a GGUF file.

    Args:
        path: the file.

    Attributes:
        metadata: key to value, as plain Python values.

    Raises:
        CheckpointError: the file is no GGUF, is damaged, or has a tensor type that isn't supported.
    """

    def __init__(self, path: Path) -> None:
        refuse_disguise(path)
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty")
        self._bytes = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
        try:
            header = read_header(self._bytes.data)
        except CheckpointError as error:
            raise CheckpointError(f"{path} can't be used: {error}") from error
        self.metadata = header.metadata
        self._tensors = header.tensors

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, row-major."""
        return {name: entry.shape for name, entry in self._tensors.items()}

    @property
    def rope_factors(self) -> tuple[float, ...] | None:
        """The divisors of the rotary frequencies, if the file has them."""
        entry = self._tensors.get(ROPE_FACTORS)
        if entry is None:
            return None
        if len(entry.shape) != 1 or entry.shape[0] > MAX_HEAD_DIM // 2:
            raise CheckpointError(
                f"{ROPE_FACTORS} is {list(entry.shape)}; it must be a short vector"
            )
        return tuple(self.read(ROPE_FACTORS).tolist())

    def block_type(self, name: str) -> BlockType | None:
        """Of a tensor that is in blocks that ``blocks`` can give; else None."""
        return BLOCK_TYPES.get(self._tensors[name].type)

    def blocks(self, name: str) -> Blocks:
        """One tensor [N, K] as whole numbers, if ``block_type`` says that it has some."""
        entry = self._tensors[name]
        return read_blocks(self._stored(entry).reshape(entry.shape[0], -1), entry.type)

    def _stored(self, entry: TensorEntry) -> NDArray[np.uint8]:
        return self._bytes[entry.offset : entry.offset + entry.num_bytes]

    def read(self, name: str) -> Array:
        """One tensor as writable float32."""
        entry = self._tensors[name]
        width = entry.shape[-1]
        stored = self._stored(entry)
        value = np.empty(entry.shape, np.float32)
        rows = value.reshape(-1, width)
        stored_rows = stored.reshape(len(rows), -1)
        step = max(1, SLAB // width)
        for start in range(0, len(rows), step):
            slab = stored_rows[start : start + step]
            rows[start : start + step] = gguf.quants.dequantize(slab, entry.type)
        return value
