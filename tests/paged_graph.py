"""A graph in the dialect ``paged`` of a tiny model, with its weights beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import build_decoder
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.build import GRAPH_FILE
from llama_export.graph_structure import check_structure
from llama_export.precision import Precision, store
from llama_export.trace import save_graph, trace_skeleton
from llama_export.weight_file import (
    WEIGHT_FILE,
    weight_regions,
    write_weights,
)

CONFIGS = {
    "untied": tiny_config(num_kv_heads=1),
    "tied": tiny_config(tie_embeddings=True, num_layers=3),
}


class PagedGraph:
    """A graph and its weights in a folder."""

    def __init__(self, folder: Path, config: LlamaConfig, precision: Precision) -> None:
        self.folder, self.config, self.precision = folder, config, precision
        self.layout = precision.layout(config)
        tables = (pair for pair in build_decoder(config, weights(config)).named_buffers())
        parameters = weights(config) + [(name, table.numpy()) for name, table in tables]
        list(write_weights(folder / WEIGHT_FILE, self.layout, store(precision, parameters)))
        model = trace_skeleton(config, precision)
        save_graph(model, folder / GRAPH_FILE, WEIGHT_FILE, weight_regions(self.layout))

    def graph(self) -> onnx.ModelProto:
        return onnx.load(self.folder / GRAPH_FILE, load_external_data=False)

    def check(self, changed: onnx.ModelProto | None = None) -> None:
        path = self.folder / GRAPH_FILE
        if changed is not None:
            path = self.folder / "changed.onnx"
            onnx.save(changed, path)
        geometry = self.config.geometry
        check_structure(path, self.folder / WEIGHT_FILE, geometry, self.precision, self.layout)


def weights(config: LlamaConfig) -> list[tuple[str, np.ndarray]]:
    return list(random_weights(config, seed=4).items())
