"""The paged graph: the contract's signature, each weight once, the right numbers where it runs.

PagedAttention runs on GPUs only. For prompts of one token it gives each query the one value there
is, so an operator that picks the values stands in for it, and all the rest of a bundle's graph runs
on the CPU as it was built.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from llama_decoder.attention import SlotInputs, eager_attention
from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import build_decoder
from llama_export.build import GRAPH_FILE
from llama_export.cache_passes import KV_SCALE
from llama_export.encoders import decode_int4
from llama_export.precision import PRODUCTS
from llama_export.precisions import CUDA_PRECISIONS
from llama_export.weight_file import WEIGHT_FILE, read_weights, weight_bytes
from llama_runtime.backends.ort_cpu import import_onnxruntime
from tests.paged_graph import CONFIGS, PagedGraph

CUDA = [recipe for recipe in CUDA_PRECISIONS.values() if recipe.target == "cuda"]
TYPES = {"float16": 10, "bfloat16": 16, "float8e4m3fn": 17, "int32": 6, "int64": 7}


@pytest.fixture(
    scope="module",
    params=[(c, p) for c in CONFIGS for p in CUDA],
    ids=lambda p: f"{p[0]} {p[1].name}",
)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PagedGraph:
    config, precision = request.param
    return PagedGraph(tmp_path_factory.mktemp("paged"), CONFIGS[config], precision)


def test_graph_speaks_the_contract(built: PagedGraph) -> None:
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


def test_only_an_fp8_cache_has_types_and_a_scale_of_its_own(built: PagedGraph) -> None:
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


def test_every_weight_is_stored_once(built: PagedGraph) -> None:
    """A tied embedding serves its two operators: on a GPU, two names are two copies."""
    graph = built.graph().graph
    size = (built.folder / WEIGHT_FILE).stat().st_size
    assert 0 < size - weight_bytes(built.layout) < 16_384
    places = [tuple(e.value for e in i.external_data) for i in graph.initializer if i.external_data]
    assert len(set(places)) == len(places) == len(built.layout)
    embedding = "model.embed_tokens.weight"
    uses = [node.op_type for node in graph.node if embedding in node.input]
    assert uses == (["Gather", "Gemm"] if built.config.tie_embeddings else ["Gather"])


def test_the_layers_have_no_gemm(built: PagedGraph) -> None:
    """Its matrix lies the other way round, or in 4 bits; the head's is the embedding's."""
    operators = [node.op_type for node in built.graph().graph.node]
    product, other = "MatMul", "MatMulNBits"
    if built.precision.int4:
        product, other = other, product
    assert operators.count(product) == 5 * built.config.num_layers
    assert operators.count(other) == 0
    assert operators.count("Gemm") == 1


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


def decoded(built: PagedGraph) -> dict[str, torch.Tensor]:
    """The stored weights in float32."""
    stored = dict(read_weights(built.folder / WEIGHT_FILE))
    result = {}
    for name, tensor in stored.items():
        if name.endswith(".int4"):
            scales = stored[f"{name.removesuffix('.int4')}.scales"]
            rows = decode_int4(tensor.numpy(), scales.numpy())
            result[name.removesuffix(".int4")] = torch.from_numpy(rows)
        elif not name.endswith(".scales"):
            turned = name.endswith(PRODUCTS)  # what isn't in 4 bits
            result[name] = tensor.float().t().contiguous() if turned else tensor.float()
    return result


def test_all_but_attention_computes_what_the_decoder_computes(built: PagedGraph) -> None:
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
