"""The paged graph: the contract's signature, each weight once, the right numbers where it runs.

PagedAttention runs on GPUs only. For prompts of one token it gives each query the one value there
is, so an operator that picks the values stands in for it, and all the rest of a bundle's graph runs
on the CPU as it was built.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper

from llama_decoder.attention import SlotInputs, eager_attention
from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import build_decoder
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.build import GRAPH_FILE, WEIGHT_FILE
from llama_export.errors import ExportError
from llama_export.graph_structure import check_structure
from llama_export.precision import KV_SCALE, PRODUCTS, Precision, dequantise_int4, store
from llama_export.precisions import CUDA_PRECISIONS
from llama_export.trace import save_graph, trace_skeleton
from llama_export.weight_file import read_weights, weight_bytes, weight_regions, write_weights
from llama_runtime.backends.ort_cpu import import_onnxruntime

CONFIGS = {
    "untied": tiny_config(num_kv_heads=1),
    "tied": tiny_config(tie_embeddings=True, num_layers=3),
}
CUDA = [recipe for recipe in CUDA_PRECISIONS.values() if recipe.target == "cuda"]
TYPES = {"float16": 10, "bfloat16": 16, "float8e4m3fn": 17, "int32": 6, "int64": 7}


class Built:
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


@pytest.fixture(
    scope="module",
    params=[(c, p) for c in CONFIGS for p in CUDA],
    ids=lambda p: f"{p[0]} {p[1].name}",
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    config, precision = request.param
    return Built(tmp_path_factory.mktemp("paged"), CONFIGS[config], precision)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """In fp16, to be broken in ways that have nothing to do with the precision."""
    return Built(tmp_path_factory.mktemp("plain"), CONFIGS["untied"], CUDA_PRECISIONS["fp16"])


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """In fp16 with keys and values in 8 bits."""
    folder = tmp_path_factory.mktemp("small")
    return Built(folder, CONFIGS["untied"], CUDA_PRECISIONS["fp16+fp8kv"])


def test_graph_speaks_the_contract(built: Built) -> None:
    built.check()
    graph, config, dialect = built.graph().graph, built.config, built.precision.dialect
    sizes = {"K": config.num_kv_heads, "D": config.head_dim, "V": config.vocab_size, "3": 3}
    inputs = (*dialect.inputs, *dialect.cache_inputs(config.num_layers))
    outputs = (dialect.logits, *dialect.cache_outputs(config.num_layers))
    for values, specs in ((graph.input, inputs), (graph.output, outputs)):
        assert [value.name for value in values] == [spec.name for spec in specs]
        for value, spec in zip(values, specs, strict=True):
            tensor = value.type.tensor_type
            axes = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
            assert tensor.elem_type == TYPES[spec.dtype], spec.name
            assert axes == [sizes.get(axis, axis) for axis in spec.axes], spec.name
    assert (built.folder / GRAPH_FILE).stat().st_size < 100_000


def test_only_an_fp8_cache_has_types_and_a_scale_of_its_own(built: Built) -> None:
    graph, fp8 = built.graph().graph, built.precision.cache is not None
    caches = [*graph.input[7:], *graph.output[1:]]
    assert len(caches) == 4 * built.config.num_layers
    assert {value.type.tensor_type.elem_type == 17 for value in caches} == {fp8}
    numbers = {t.name: t for t in graph.initializer if not t.external_data and t.data_type == 1}
    assert set(numbers) == ({KV_SCALE} if fp8 else set())
    for tensor in numbers.values():
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), np.ones(1, np.float32))
    for node in graph.node:
        if node.op_type == "PagedAttention":
            assert list(node.input[14:16]) == [KV_SCALE if fp8 else ""] * 2
            kinds = {a.name: a.s for a in node.attribute if a.name.endswith("quant_type")}
            assert kinds == (
                dict.fromkeys(("k_quant_type", "v_quant_type"), b"PER_TENSOR") if fp8 else {}
            )


def test_every_weight_is_stored_once(built: Built) -> None:
    """A tied embedding serves its two operators: on a GPU, two names are two copies."""
    graph = built.graph().graph
    size = (built.folder / WEIGHT_FILE).stat().st_size
    assert 0 < size - weight_bytes(built.layout) < 16_384
    places = [tuple(e.value for e in i.external_data) for i in graph.initializer if i.external_data]
    assert len(set(places)) == len(places) == len(built.layout)
    embedding = "model.embed_tokens.weight"
    uses = [node.op_type for node in graph.node if embedding in node.input]
    assert uses == (["Gather", "Gemm"] if built.config.tie_embeddings else ["Gather"])


def test_the_layers_have_no_gemm(built: Built) -> None:
    """Its matrix lies the other way round, or in 4 bits; the head's is the embedding's."""
    operators = [node.op_type for node in built.graph().graph.node]
    product, other = "MatMul", "MatMulNBits"
    if built.precision.int4:
        product, other = other, product
    assert operators.count(product) == 5 * built.config.num_layers
    assert operators.count(other) == 0
    assert operators.count("Gemm") == 1


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
    plain: Built, change: Callable[[Any], None], message: str
) -> None:
    model = plain.graph()
    change(model.graph)
    with pytest.raises(ExportError, match=message):
        plain.check(model)


def test_a_4_bit_graph_with_another_product_is_refused(tmp_path: Path) -> None:
    built = Built(tmp_path, CONFIGS["untied"], CUDA_PRECISIONS["int4"])
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
    small_cache: Built, change: Callable[[Any], None], message: str
) -> None:
    small_cache.check()
    model = small_cache.graph()
    change(model.graph)
    with pytest.raises(ExportError, match=message):
        small_cache.check(model)


def test_a_scale_is_for_fp8_graphs_only(plain: Built, small_cache: Built) -> None:
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
    scale: np.ndarray, small_cache: Built, tmp_path: Path
) -> None:
    model = trace_skeleton(small_cache.config, small_cache.precision)
    model.graph.initializers[KV_SCALE].const_value = ir.tensor(scale, name=KV_SCALE)
    regions = weight_regions(small_cache.layout)
    with pytest.raises(ExportError, match="holds a constant of its own: kv_scale"):
        save_graph(model, tmp_path / GRAPH_FILE, WEIGHT_FILE, regions)


def test_a_weight_file_of_another_layout_is_refused(plain: Built) -> None:
    plain.layout, layout = CUDA_PRECISIONS["bf16"].layout(plain.config), plain.layout
    with pytest.raises(ExportError, match="holds other tensors than"):
        plain.check()
    plain.layout = layout


def without_attention(model: onnx.ModelProto, config: LlamaConfig) -> onnx.ModelProto:
    """The model with each PagedAttention as a Gather of the values, and logits alone as output."""
    queries = config.num_heads * config.head_dim
    first = queries + config.num_kv_heads * config.head_dim
    group = config.num_heads // config.num_kv_heads
    columns = np.arange(config.num_kv_heads * config.head_dim).reshape(-1, config.head_dim)
    picked = first + np.repeat(columns, group, axis=0).ravel()
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(picked, "picked"))
    for place, node in enumerate(graph.node):
        if node.op_type == "PagedAttention":
            names = [node.input[0], "picked"], [node.output[0]]
            graph.node[place].CopyFrom(helper.make_node("Gather", *names, axis=1))
    del graph.output[1:]
    for value in list(graph.input)[2:]:
        graph.input.remove(value)
    return model


def in_float32(model: onnx.ModelProto) -> None:
    """Give everything that is bfloat16 the same values in float32."""
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
            values = bits.view(np.float32).reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    result: list[np.ndarray] = session.run(None, feed)
    return result


def decoded(built: Built) -> dict[str, torch.Tensor]:
    """The stored weights in float32."""
    stored = dict(read_weights(built.folder / WEIGHT_FILE))
    result = {}
    for name, tensor in stored.items():
        if name.endswith(".int4"):
            scales = stored[f"{name.removesuffix('.int4')}.scales"]
            rows = dequantise_int4(tensor.numpy(), scales.numpy())
            result[name.removesuffix(".int4")] = torch.from_numpy(rows)
        elif not name.endswith(".scales"):
            turned = name.endswith(PRODUCTS)  # what isn't in 4 bits
            result[name] = tensor.float().t().contiguous() if turned else tensor.float()
    return result


def test_all_but_attention_computes_what_the_decoder_computes(built: Built) -> None:
    """On ONNX Runtime's CPU kernels, which have fp16 and no bf16: that graph runs in float32."""
    model = without_attention(onnx.load(built.folder / GRAPH_FILE), built.config)
    if built.precision.activations == "bfloat16":
        in_float32(model)
    ids = np.random.default_rng(0).integers(0, built.config.vocab_size, 8)
    rows = np.array([6, 0, 3])
    (logits,) = run(model, {"input_ids": ids, "logits_rows": rows})

    decoder = build_decoder(built.config, decoded(built).items(), eager_attention)
    one = torch.ones(8, dtype=torch.int32)
    places = SlotInputs(torch.arange(8)[:, None], torch.arange(8), one - 1, one, one[0])
    inputs = torch.from_numpy(ids), torch.from_numpy(rows)
    expected, _ = decoder(*inputs, places, decoder.empty_cache(8, 1))
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits.astype(np.float32), expected.numpy(), atol=0.03)
