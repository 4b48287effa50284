"""A graph for CUDA that is off in one way is refused, on a host that can't run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from llama_export.build import GRAPH_FILE
from llama_export.cache_passes import KV_SCALE
from llama_export.errors import ExportError
from llama_export.precisions import CUDA_PRECISIONS
from llama_export.trace import save_graph, trace_skeleton
from llama_export.weight_file import WEIGHT_FILE, weight_regions
from tests.paged_graph import CONFIGS, PagedGraph


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> PagedGraph:
    """In fp16, to be broken in ways that have nothing to do with the precision."""
    return PagedGraph(tmp_path_factory.mktemp("plain"), CONFIGS["untied"], CUDA_PRECISIONS["fp16"])


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> PagedGraph:
    """In fp16 with keys and values in 8 bits."""
    folder = tmp_path_factory.mktemp("small")
    return PagedGraph(folder, CONFIGS["untied"], CUDA_PRECISIONS["fp16+fp8kv"])


def first_of(graph: Any, operator: str) -> Any:
    return next(node for node in graph.node if node.op_type == operator)


def swap_presents(graph: Any) -> None:
    node = first_of(graph, "PagedAttention")
    node.output[1], node.output[2] = node.output[2], node.output[1]


def swap_layers(graph: Any) -> None:
    first, second = [node for node in graph.node if node.op_type == "PagedAttention"]
    for place in (1, 2):
        first.output[place], second.output[place] = second.output[place], first.output[place]


def forget_metadata(graph: Any) -> None:
    first_of(graph, "PagedAttention").input[16] = ""


def swap_tables(graph: Any) -> None:
    node = first_of(graph, "PagedAttention")
    node.input[8], node.input[9] = node.input[9], node.input[8]


def forget_rotation(graph: Any) -> None:
    node = first_of(graph, "PagedAttention")
    node.attribute.remove(next(a for a in node.attribute if a.name == "do_rotary"))


def another_operator(graph: Any) -> None:
    first_of(graph, "Sigmoid").op_type = "Softmax"


def keep_a_gemm(graph: Any) -> None:
    node = next(n for n in graph.node if "model.layers.1.mlp.down_proj.weight" in n.input)
    node.op_type = "Gemm"


def multiply_the_wrong_way(graph: Any) -> None:
    node = first_of(graph, "MatMul")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def another_head(graph: Any) -> None:
    node = first_of(graph, "Gemm")
    del node.attribute[:]
    node.op_type = "MatMul"


def quantise_nothing(graph: Any) -> None:
    first_of(graph, "MatMul").op_type = "MatMulNBits"
    first_of(graph, "MatMulNBits").domain = "com.microsoft"


def unknown_operator(graph: Any) -> None:
    first_of(graph, "Sigmoid").op_type = "Tanh"


def rename_input(graph: Any) -> None:
    graph.input[2].name = "lengths"


def float_logits(graph: Any) -> None:
    graph.output[0].type.tensor_type.elem_type = 1


def fix_an_axis(graph: Any) -> None:
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 12


def lose_a_layer(graph: Any) -> None:
    graph.output.pop()


def weights_of(graph: Any, name: str) -> Any:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def move_weights(graph: Any) -> None:
    one, two = (
        next(
            e
            for e in weights_of(graph, f"model.layers.{i}.mlp.down_proj.weight").external_data
            if e.key == "offset"
        )
        for i in (0, 1)
    )
    one.value, two.value = two.value, one.value


def forget_weights(graph: Any) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    node = next(node for node in graph.node if name in node.input)
    node.input[list(node.input).index(name)] = "model.layers.0.self_attn.o_proj.weight"


def another_type(graph: Any) -> None:
    weights_of(graph, "model.norm.weight").data_type = 16


def own_weights(graph: Any) -> None:
    graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float16), "own"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_presents, "attention of layer 0 reads"),
        (swap_layers, "attention of layer 0 reads"),
        (forget_metadata, "attention of layer 0 reads"),
        (swap_tables, "attention of layer 0 reads"),
        (forget_rotation, "attention of layer 0 has"),
        (another_operator, "operators that no pass makes: Softmax"),
        (keep_a_gemm, r"Gemm of \S+, model\.layers\.1\.mlp\.down_proj\.weight where MatMul of a"),
        (multiply_the_wrong_way, r"MatMul of model\S+qkv_proj\.weight, \S+ where MatMul of a"),
        (another_head, r"MatMul of \S+, lm_head\.weight where MatMul of a layer's matrix belongs"),
        (quantise_nothing, "operators that no pass makes: MatMulNBits"),
        (unknown_operator, "the runtime will refuse the graph: .*Tanh"),
        (rename_input, "has .'lengths'.* where the contract has .'cumulative"),
        (float_logits, "has .'logits', 1.* where the contract has .'logits', 10"),
        (fix_an_axis, "where the contract has .'input_ids', 7, .'N'"),
        (lose_a_layer, "has 4 inputs or outputs, not 5"),
        (move_weights, r"layers\.0\.mlp\.down_proj\.weight as"),
        (forget_weights, r"doesn't use the weights model\.layers\.1\.self_attn\.o_proj"),
        (another_type, r"has model\.norm\.weight as \(16"),
        (own_weights, "weights that the file doesn't: own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_graph_that_is_off_in_one_way_is_refused(
    plain: PagedGraph, change: Callable[[Any], None], message: str
) -> None:
    model = plain.graph()
    change(model.graph)
    with pytest.raises(ExportError, match=message):
        plain.check(model)


def test_a_4_bit_graph_with_another_product_is_refused(tmp_path: Path) -> None:
    built = PagedGraph(tmp_path, CONFIGS["untied"], CUDA_PRECISIONS["int4"])
    model = built.graph()
    model.graph.node.remove(first_of(model.graph, "MatMulNBits"))
    node = first_of(model.graph, "MatMulNBits")
    node.op_type, node.domain = "Gemm", ""
    with pytest.raises(ExportError, match=r"Gemm of .*weight\.scales where MatMulNBits of a"):
        built.check(model)


def of_another_scale(graph: Any) -> None:
    weights_of(graph, KV_SCALE).raw_data = np.float32(0.5).tobytes()


def two_scales(graph: Any) -> None:
    tensor = weights_of(graph, KV_SCALE)
    tensor.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), KV_SCALE))


def half_a_scale(graph: Any) -> None:
    tensor = weights_of(graph, KV_SCALE)
    tensor.CopyFrom(numpy_helper.from_array(np.ones(1, np.float16), KV_SCALE))


def forget_the_scale(graph: Any) -> None:
    first_of(graph, "PagedAttention").input[15] = ""


def per_channel(graph: Any) -> None:
    node = first_of(graph, "PagedAttention")
    next(a for a in node.attribute if a.name == "k_quant_type").s = b"PER_CHANNEL"


def forget_a_kind(graph: Any) -> None:
    node = first_of(graph, "PagedAttention")
    node.attribute.remove(next(a for a in node.attribute if a.name == "v_quant_type"))


def a_cache_in_16_bits(graph: Any) -> None:
    graph.input[-1].type.tensor_type.elem_type = 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_scale, "as the scale of its cache, not one 1"),
        (two_scales, "as the scale of its cache, not one 1"),
        (half_a_scale, "as the scale of its cache, not one 1"),
        (forget_the_scale, "attention of layer 0 reads"),
        (per_channel, "attention of layer 0 has"),
        (forget_a_kind, "attention of layer 0 has"),
        (a_cache_in_16_bits, r"has .'past\S+value', 10.* where the contract has .'past\S+', 17"),
        (own_weights, "weights that the file doesn't: own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_fp8_graph_that_is_off_in_one_way_is_refused(
    small_cache: PagedGraph, change: Callable[[Any], None], message: str
) -> None:
    small_cache.check()
    model = small_cache.graph()
    change(model.graph)
    with pytest.raises(ExportError, match=message):
        small_cache.check(model)


def test_a_scale_is_for_fp8_graphs_only(plain: PagedGraph, small_cache: PagedGraph) -> None:
    model = plain.graph()
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), KV_SCALE))
    with pytest.raises(ExportError, match="weights that the file doesn't: kv_scale"):
        plain.check(model)
    with pytest.raises(ExportError, match="where the contract has"):
        plain.check(small_cache.graph())
    with pytest.raises(ExportError, match="where the contract has"):
        small_cache.check(plain.graph())


@pytest.mark.parametrize(
    "scale",
    [np.zeros(1, "f4"), np.full(1, 1.0000001, "f4"), np.ones(2, "f4"), np.ones(1, "f8")],
    ids=str,
)
def test_no_other_constant_is_saved_under_the_name_of_the_scale(
    scale: np.ndarray, small_cache: PagedGraph, tmp_path: Path
) -> None:
    model = trace_skeleton(small_cache.config, small_cache.precision)
    model.graph.initializers[KV_SCALE].const_value = ir.tensor(scale, name=KV_SCALE)
    regions = weight_regions(small_cache.layout)
    with pytest.raises(ExportError, match="holds a constant of its own: kv_scale"):
        save_graph(model, tmp_path / GRAPH_FILE, WEIGHT_FILE, regions)


def test_a_weight_file_of_another_layout_is_refused(plain: PagedGraph) -> None:
    plain.layout, layout = CUDA_PRECISIONS["bf16"].layout(plain.config), plain.layout
    with pytest.raises(ExportError, match="holds other tensors than"):
        plain.check()
    plain.layout = layout
