"""A pass changes how a graph computes, not what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from llama_decoder.attention import slots_attention
from llama_decoder.decoder import build_decoder, rope_buffers
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.passes import fold_residuals
from llama_export.trace import save_graph, trace_decoder
from llama_export.weight_file import read_weights, weight_regions, write_weights
from llama_runtime.backends.ort_cpu import import_onnxruntime
from llama_runtime.contract import SLOTS

F32 = onnx.TensorProto.FLOAT


def model(*, product_is_used: bool) -> onnx.ModelProto:
    """y = x + a·wᵀ, and twice that product if it has another use."""
    nodes = [
        helper.make_node("Gemm", ["a", "w"], ["product"], transB=1),
        helper.make_node("Add", ["x", "product"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", F32, ["n", 4])]
    if product_is_used:
        nodes.append(helper.make_node("Add", ["product", "product"], ["twice"]))
        outputs.append(helper.make_tensor_value_info("twice", F32, ["n", 4]))
    inputs = [
        helper.make_tensor_value_info(name, F32, shape)
        for name, shape in (("a", ["n", 3]), ("x", ["n", 4]), ("w", [4, 3]))
    ]
    graph = helper.make_graph(nodes, "sum", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def outputs(proto: onnx.ModelProto) -> list[np.ndarray]:
    ort = import_onnxruntime()
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    shapes = {"a": (5, 3), "x": (5, 4), "w": (4, 3)}
    feed = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    result: list[np.ndarray] = session.run(None, feed)
    return result


@pytest.mark.parametrize("product_is_used", [False, True])
def test_a_residual_is_folded_only_where_nobody_else_wants_the_product(
    product_is_used: bool,
) -> None:
    proto = model(product_is_used=product_is_used)
    before = outputs(proto)
    changed = ir.from_proto(proto)
    assert fold_residuals(changed) == (0 if product_is_used else 1)
    assert [node.op_type for node in changed.graph].count("Add") == (2 if product_is_used else 0)
    for old, new in zip(before, outputs(ir.to_proto(changed)), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)


def test_every_residual_of_a_traced_decoder_is_folded(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False).graph
    assert not [node for node in graph.node if node.op_type == "Add"]
    sums = [node for node in graph.node if node.op_type == "Gemm" and len(node.input) == 3]
    assert len(sums) == 2 * tiny_config().num_layers


def test_a_tied_matrix_gets_a_second_name_over_the_same_bytes(tmp_path: Path) -> None:
    """Otherwise ONNX Runtime keeps it beside its packed copy."""
    graph = trace_tiny(tmp_path, tie_embeddings=True)
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    gathered, multiplied = (
        stored[name] for name in ("model.embed_tokens.weight", "model.embed_tokens.weight.factor")
    )
    assert list(gathered.external_data) == list(multiplied.external_data)
    assert len(gathered.external_data) == 3
    uses = {
        name: [node.op_type for node in graph.graph.node if name in node.input]
        for name in (gathered.name, multiplied.name)
    }
    assert uses == {gathered.name: ["Gather"], multiplied.name: ["Gemm"]}
    for node in graph.graph.node:
        assert not {"rope_cos.factor", "rope_sin.factor"} & set(node.input)


def test_an_untied_graph_keeps_its_initializers(tmp_path: Path) -> None:
    graph = trace_tiny(tmp_path, tie_embeddings=False)
    assert not [tensor.name for tensor in graph.graph.initializer if "factor" in tensor.name]


def trace_tiny(folder: Path, *, tie_embeddings: bool) -> onnx.ModelProto:
    """The graph of the tiny model, its weights where they lie."""
    config = tiny_config(tie_embeddings=tie_embeddings, num_layers=1)
    buffers = {name: tensor.numpy() for name, tensor in rope_buffers(config)}
    weights = random_weights(config, seed=0) | buffers
    shapes = {name: weight.shape for name, weight in weights.items()}
    list(write_weights(folder / "weights.safetensors", shapes, weights.items()))
    stored = read_weights(folder / "weights.safetensors")
    traced = trace_decoder(build_decoder(config, stored, slots_attention), SLOTS)
    save_graph(traced, folder / "decoder.onnx", "weights.safetensors", weight_regions(shapes))
    return onnx.load(folder / "decoder.onnx", load_external_data=False)
