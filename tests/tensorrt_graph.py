"""The graph for TensorRT in float32, run by ONNX Runtime on the CPU: slow, but right.

A step takes any chunks of any slots at once, which is more than the engine asks of it. Cells of the
cache that no token owns hold what padding and idle slots wrote, as they would on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import rope_buffers
from llama_decoder.tiny import random_weights
from llama_export.precisions import TENSORRT_CHECK
from llama_export.trace import save_graph, trace_skeleton
from llama_export.weight_file import weight_regions, write_weights
from llama_runtime.contract import TENSORRT

WEIGHTS = "model.safetensors"
Floats = npt.NDArray[np.float32]


def write_tensorrt_graph(
    config: LlamaConfig, weights: Iterable[tuple[str, Floats]], folder: Path
) -> Path:
    """The graph in float32, its weights beside it.

    Args:
        config: the model's numbers.
        weights: every parameter, in the decoder's order.
        folder: where both go.
    """
    layout = TENSORRT_CHECK.layout(config)
    tables = ((name, table.numpy()) for name, table in rope_buffers(config))
    for _ in write_weights(folder / WEIGHTS, layout, (*weights, *tables)):
        pass
    return write_graph_alone(config, folder)


def write_graph_alone(config: LlamaConfig, folder: Path) -> Path:
    """The same over weights that lie there already, as a bundle in fp32 has them."""
    regions = weight_regions(TENSORRT_CHECK.layout(config))
    path = folder / "tensorrt.onnx"
    save_graph(trace_skeleton(config, TENSORRT_CHECK), path, WEIGHTS, regions)
    return path


def tiny_tensorrt_graph(config: LlamaConfig, seed: int, folder: Path) -> Path:
    """One with random weights, which are those of ``llama_decoder.tiny``."""
    return write_tensorrt_graph(config, random_weights(config, seed).items(), folder)


class GraphRun:
    """Slots of a cache, and steps over them.

    Args:
        graph: of ``write_tensorrt_graph``.
        config: the model's numbers.
        num_slots: B.
        capacity: C.
    """

    def __init__(self, graph: Path, config: LlamaConfig, num_slots: int, capacity: int) -> None:
        self._session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self._names = [spec.name for spec in TENSORRT.cache_inputs(config.num_layers)]
        shape = num_slots, config.num_kv_heads, capacity, config.head_dim
        self._cache = [np.zeros(shape, np.float32) for _ in self._names]
        self.lengths = [0] * num_slots

    def step(self, chunks: Mapping[int, Sequence[int]]) -> dict[int, Floats]:
        """Run new tokens of some slots; the logits of each one's new tokens, [tokens, V].

        The others are there, idle, with what they hold.
        """
        width = max(map(len, chunks.values()))
        past = np.array(self.lengths, np.int64)
        capacity = self._cache[0].shape[2]
        assert (past + width <= capacity).all(), "TensorRT would drop what doesn't fit"
        unpack = np.zeros((len(past), width), np.int64)
        tokens: list[int] = []
        pack: list[int] = []
        for slot, chunk in chunks.items():
            unpack[slot, : len(chunk)] = np.arange(len(tokens), len(tokens) + len(chunk))
            pack += [slot * width + column for column in range(len(chunk))]
            tokens += chunk
            self.lengths[slot] += len(chunk)
        given = {
            "input_ids": np.array(tokens, np.int64),
            "logits_rows": np.arange(len(tokens)),
            "unpack": unpack,
            "pack": np.array(pack, np.int64),
            "past_lengths": past,
            **dict(zip(self._names, self._cache, strict=True)),
        }
        logits, *self._cache = self._session.run(None, given)
        bounds = np.cumsum([0, *map(len, chunks.values())])
        return {
            slot: logits[begin:end]
            for slot, begin, end in zip(chunks, bounds, bounds[1:], strict=False)
        }

    def free(self, slot: int) -> None:
        """Give a slot to somebody else, who begins at its first cell."""
        self.lengths[slot] = 0
