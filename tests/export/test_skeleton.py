"""Tracing reads no weights: what is traced has their types and shapes, and nothing more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from llama_decoder.attention import slots_attention
from llama_decoder.shapes import LLAMA_3_2_1B
from llama_decoder.tiny import tiny_config
from llama_export.errors import ExportError
from llama_export.precisions import CPU_PRECISIONS, CUDA_PRECISIONS
from llama_export.trace import save_graph, skeleton, trace_decoder, trace_skeleton
from llama_export.weight_file import WEIGHT_FILE, weight_bytes, weight_regions
from llama_runtime.contract import SLOTS


def resident_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_tracing_touches_no_weights(name: str) -> None:
    """The matrices of Llama 3.2 1B, two layers: 1.6 GB in fp32, of which nothing is used."""
    config = replace(LLAMA_3_2_1B, num_layers=2)
    recipe = (CPU_PRECISIONS | CUDA_PRECISIONS)[name]
    trace_skeleton(tiny_config(), recipe)  # loads what every trace loads
    before = resident_bytes()
    model = trace_skeleton(config, recipe)
    assert resident_bytes() - before < 2e8
    layout = recipe.layout(config)
    assert set(model.graph.initializers) >= set(layout)
    assert weight_bytes(layout) > 7e8


def test_norms_that_are_equal_in_the_model_stay_apart() -> None:
    """The exporter takes equal small initializers for one; a skeleton has none."""
    decoder = skeleton(tiny_config(), slots_attention, torch.float32)
    small = [t for t in decoder.state_dict().values() if t.numel() <= 1024]
    assert len(small) == 5
    assert len({tensor.numpy().tobytes() for tensor in small}) == len(small)
    graph = trace_decoder(decoder, SLOTS).graph
    assert {name for name in decoder.state_dict() if "norm" in name} <= set(graph.initializers)


def test_a_constant_that_tracing_made_is_refused(tmp_path: Path) -> None:
    """It may have been computed from parameters that mean nothing."""
    recipe = CUDA_PRECISIONS["fp16"]
    model = trace_skeleton(tiny_config(), recipe)
    own = ir.Value(name="own", const_value=ir.tensor(np.ones(3, np.float16), name="own"))
    model.graph.register_initializer(own)
    regions = weight_regions(recipe.layout(tiny_config()))
    with pytest.raises(ExportError, match="holds a constant of its own: own"):
        save_graph(model, tmp_path / "g.onnx", WEIGHT_FILE, regions)
    del model.graph.initializers["own"]
    wrong = weight_regions(CUDA_PRECISIONS["bf16"].layout(tiny_config()))
    with pytest.raises(ExportError, match=r"traced graph has model\.\S* as FLOAT16"):
        save_graph(model, tmp_path / "g.onnx", WEIGHT_FILE, wrong)
