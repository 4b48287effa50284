"""A pass changes how a graph computes, not what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from llama_decoder.attention import slots_attention
from llama_decoder.decoder import build_decoder, rope_buffers
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.cache_passes import quantise_paged_cache
from llama_export.gpu_products import transpose_products
from llama_export.passes import fold_residuals, fuse_skip_norms
from llama_export.trace import save_graph, trace_decoder
from llama_export.weight_file import (
    float32_layout,
    read_weights,
    weight_regions,
    write_weights,
)
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


class Norms(torch.nn.Module):
    """A norm alone, then a sum that is normed and used again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.RMSNorm(8, 1e-5), torch.nn.RMSNorm(8, 1e-3)
        self.product = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x + self.product(self.first(x))
        result: torch.Tensor = total + self.product(self.second(total))
        return result


def test_fused_norms_compute_what_torch_computes() -> None:
    torch.manual_seed(0)
    module = Norms().requires_grad_(False).eval()
    for norm in (module.first, module.second):
        norm.weight.copy_(1 + 0.3 * torch.randn(8))
    x = 0.05 * torch.randn(5, 8)  # small, so that epsilon matters
    program = torch.onnx.export(
        module, (x,), dynamic_shapes=({0: "n"},), opset_version=23, dynamo=True, verbose=False
    )
    assert program is not None
    model = program.model
    assert fuse_skip_norms(model) == 1
    operators = [node.op_type for node in model.graph]
    assert operators.count("SkipSimplifiedLayerNormalization") == 1
    assert operators.count("SimplifiedLayerNormalization") == 1
    assert operators.count("Add") == 1
    model.opset_imports["com.microsoft"] = 1
    ort = import_onnxruntime()
    serialized = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {model.graph.inputs[0].name: x.numpy()})
    np.testing.assert_allclose(result, module(x).numpy(), rtol=1e-5, atol=1e-6)


MATRIX = "layer.o_proj.weight"


def product(weights: np.ndarray, **changed: object) -> ir.Model:
    """y = x·wᵀ, or what the changed name, attribute or further inputs make of it."""
    name = str(changed.get("name", MATRIX))
    inputs = ["x", name, *(["c"] if "c" in changed else [])]
    nodes = [helper.make_node("Gemm", inputs, ["y"], transB=changed.get("transB", 1))]
    outputs = [helper.make_tensor_value_info("y", F32, ["n", "m"])]
    if "another_use" in changed:
        nodes.append(helper.make_node("Add", [name, name], ["z"]))
        outputs.append(helper.make_tensor_value_info("z", F32, ["n", "m"]))
    given = [helper.make_tensor_value_info(i, F32, ["n", "m"]) for i in inputs if i != name]
    stored = [onnx.numpy_helper.from_array(weights, name)]
    graph = helper.make_graph(nodes, "product", given, outputs, stored)
    opset = [helper.make_opsetid("", 23)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_transposed_product_computes_the_same(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(shape, np.float32)
    x = rng.standard_normal((3, shape[1]), np.float32)
    changed = product(weights)
    assert transpose_products(changed) == 1
    assert [node.op_type for node in changed.graph] == ["MatMul"]
    initializer = changed.graph.initializers[MATRIX]
    assert tuple(initializer.shape) == tuple(initializer.const_value.shape) == shape[::-1]
    ort = import_onnxruntime()
    serialized = ir.to_proto(changed).SerializeToString()
    session = ort.InferenceSession(serialized, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weights.T, rtol=1e-5, atol=1e-6)


def test_a_transposed_matrix_keeps_its_type_and_its_bits() -> None:
    """Also that which numpy doesn't have."""
    weights = torch.randn(6, 4).to(torch.bfloat16)
    bits = weights.view(torch.int16).numpy()
    changed = product(np.zeros((6, 4), np.float32))
    initializer = changed.graph.initializers[MATRIX]
    initializer.type = ir.TensorType(ir.DataType.BFLOAT16)
    initializer.const_value = ir.tensor(weights, name=MATRIX)
    transpose_products(changed)
    turned = changed.graph.initializers[MATRIX]
    assert turned.dtype == turned.const_value.dtype == ir.DataType.BFLOAT16
    assert turned.const_value.tobytes() == np.ascontiguousarray(bits.T).tobytes()


@pytest.mark.parametrize(
    "changed", [{"name": "lm_head.weight"}, {"transB": 0}, {"c": True}, {"another_use": True}]
)
def test_another_product_is_not_transposed(changed: dict[str, object]) -> None:
    weights = np.arange(25, dtype=np.float32).reshape(5, 5)
    model = product(weights, **changed)
    before = ir.to_proto(model).SerializeToString()
    assert transpose_products(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_a_graph_without_paged_attention_gets_no_scale() -> None:
    model = product(np.ones((4, 4), np.float32))
    before = ir.to_proto(model).SerializeToString()
    assert quantise_paged_cache(model) == 0
    assert ir.to_proto(model).SerializeToString() == before


def trace_tiny(folder: Path, *, tie_embeddings: bool) -> onnx.ModelProto:
    """The graph of the tiny model, its weights where they lie."""
    config = tiny_config(tie_embeddings=tie_embeddings, num_layers=1)
    buffers = {name: tensor.numpy() for name, tensor in rope_buffers(config)}
    weights = random_weights(config, seed=0) | buffers
    layout = float32_layout({name: weight.shape for name, weight in weights.items()})
    list(write_weights(folder / "weights.safetensors", layout, weights.items()))
    stored = read_weights(folder / "weights.safetensors")
    traced = trace_decoder(build_decoder(config, stored, slots_attention), SLOTS)
    save_graph(traced, folder / "decoder.onnx", "weights.safetensors", weight_regions(layout))
    return onnx.load(folder / "decoder.onnx", load_external_data=False)
