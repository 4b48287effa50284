"""What is stored is what torch's own casts make of it, and 4 bits are what the operator reads."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper

from llama_decoder.tiny import random_weights, tiny_config
from llama_decoder.weights import parameter_shapes
from llama_export import cli, device_check, precision
from llama_export.errors import ExportError
from llama_export.host_weights import BLOCKS, BlockWeights
from llama_export.passes import quantise_products
from llama_export.precision import (
    INT4_BLOCK,
    PRODUCTS,
    TARGETS,
    dequantise_int4,
    in_file_order,
    int4_names,
    quantise_int4,
    store,
)
from llama_export.precisions import CPU_PRECISIONS, CUDA_PRECISIONS, KV_CACHES, choose_precision
from llama_runtime import cuda_loading, slots_precision
from llama_runtime.backends.ort_cpu import import_onnxruntime

FP16, BF16, INT4 = (CUDA_PRECISIONS[name] for name in ("fp16", "bf16", "int4"))
KINDS = (
    *("self_attn.qkv_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


def adversarial() -> np.ndarray:
    """Float32 numbers of every size: zeros, subnormals, ties between two halves, largest ones."""
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[1:] + halves[:-1]) / 2  # exact in float32
    brains = (np.arange(0, 0x7F80, 7, dtype=np.uint32) << 16) + 0x8000  # ties of bfloat16
    values = np.concatenate(
        [
            bits.view(np.float32),
            halves,
            *(np.nextafter(between, side) for side in (np.float32(0), np.float32(1e9))),
            between,
            brains.view(np.float32),
            (brains + 1).view(np.float32),
            (brains - 1).view(np.float32),
            np.array([0, 1e-45, 65504, 65519.996, 6e-8, 2.9802322e-8], np.float32),
        ]
    )
    values = values[np.isfinite(values)]
    return np.concatenate([values, -values])


@pytest.mark.parametrize("recipe", [FP16, BF16], ids=["fp16", "bf16"])
def test_stored_bits_are_those_of_torch(recipe: precision.Precision) -> None:
    values = adversarial()
    cast = torch.from_numpy(values).to(getattr(torch, recipe.activations))
    fitting = cast.isfinite()
    (stored,) = recipe.encode("norm", values[fitting.numpy()])
    expected = cast[fitting].view(torch.int16).numpy()
    assert len(expected) > 200_000
    np.testing.assert_array_equal(stored.view(np.int16), expected)


@pytest.mark.parametrize("recipe", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block", [1, 1000, 50_000, precision.BLOCK_ELEMENTS])
def test_a_product_is_stored_as_the_transpose_of_torchs_cast(
    recipe: precision.Precision, product: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that are no larger than a block, whatever a block is."""
    values = adversarial()
    cast = torch.from_numpy(values).to(getattr(torch, recipe.activations))
    rows, columns = 311, 643
    values = values[cast.isfinite().numpy()][: rows * columns].reshape(rows, columns)
    expected = torch.from_numpy(values).to(cast.dtype).t().contiguous().view(torch.int16).numpy()
    monkeypatch.setattr(precision, "BLOCK_ELEMENTS", block)
    name = f"model.layers.0.{product}"
    stored = list(store(recipe, [(name, values)]))
    assert {given for given, _ in stored} == {name}
    pieces = [piece for _, piece in stored]
    assert max(piece.size for piece in pieces) <= max(block, rows)
    assert all(piece.flags.c_contiguous for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces).view(np.int16), expected)


def test_no_more_than_one_transposed_parameter_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "BLOCK_ELEMENTS", 1000)
    alive: list[weakref.ref[np.ndarray]] = []

    def blocks() -> Iterator[tuple[str, tuple[np.ndarray]]]:
        for layer in range(3):
            for _ in range(20):
                block = np.zeros((100, 10), np.float16)
                alive.append(weakref.ref(block))
                yield f"model.layers.{layer}.mlp.down_proj.weight", (block,)
                del block

    for _, piece in in_file_order(FP16, blocks()):
        assert piece.shape == (5, 200)
        assert sum(ref() is not None for ref in alive) <= 21
    assert len(alive) == 60


@pytest.mark.parametrize("value", [65520.0, -1e30])
def test_a_weight_too_large_for_fp16_is_named_with_the_way_out(value: float) -> None:
    weights = np.array([[1, 2], [3, value]], np.float32)
    with pytest.raises(ExportError, match=r"layer\.weight reach .* --precision bf16"):
        FP16.encode("layer.weight", weights)
    assert BF16.encode("layer.weight", weights)[0].dtype == np.uint16


def test_a_weight_too_large_for_bf16_is_named() -> None:
    with pytest.raises(ExportError, match=r"layer\.weight hold values too large for bf16"):
        BF16.encode("layer.weight", np.array([3.4e38], np.float32))


@pytest.mark.parametrize("recipe", [FP16, BF16, INT4], ids=["fp16", "bf16", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(recipe: precision.Precision, value: float) -> None:
    weights = np.ones((2, 32), np.float32)
    weights[1, 3] = value
    with pytest.raises(ExportError, match=r"a\.o_proj\.weight hold values that are not finite"):
        recipe.encode("a.o_proj.weight", weights)


def blocks_of_all_kinds() -> np.ndarray:
    """Rows of products: random, zeros, of one sign, equal extremes, halves of a step, outliers."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((40, 4 * INT4_BLOCK), dtype=np.float32)
    rows[0] = 0
    rows[1] = np.abs(rows[1])
    rows[2] = -np.abs(rows[2])
    rows[3, ::INT4_BLOCK], rows[3, 1::INT4_BLOCK] = 4, -4
    rows[4, ::INT4_BLOCK], rows[4, 1::INT4_BLOCK] = -4, 4
    rows[5] = (np.arange(4 * INT4_BLOCK) % 17 - 8) / 2  # steps and their halves
    rows[6, 5] = 500
    rows[7] *= np.float32(1e-4)
    return rows


def test_int4_bytes_are_those_of_onnxruntime() -> None:
    import_onnxruntime()
    from onnxruntime.capi.onnxruntime_pybind11_state import quantize_matmul_4bits

    rows = blocks_of_all_kinds()
    num_rows, columns = rows.shape
    blocks = columns // INT4_BLOCK
    expected = np.zeros((num_rows, blocks, INT4_BLOCK // 2), np.uint8)
    scales = np.zeros(num_rows * blocks, np.float32)
    zeros = np.zeros(num_rows * blocks, np.uint8)
    transposed = np.ascontiguousarray(rows.T)
    quantize_matmul_4bits(expected, transposed, scales, zeros, INT4_BLOCK, num_rows, columns, True)
    packed, halves = quantise_int4("w", rows)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(halves.ravel(), scales.astype(np.float16))


def test_int4_is_off_by_half_a_step_at_most_except_at_one_end() -> None:
    rows = blocks_of_all_kinds()
    packed, scales = quantise_int4("w", rows)
    error = np.abs(dequantise_int4(packed, scales) - rows).reshape(len(rows), -1, INT4_BLOCK)
    step = np.abs(scales.astype(np.float32))[..., None]
    assert (error <= 1.01 * step + 1e-7).all()  # the end of the other sign has 7 steps, not 8
    assert np.quantile(error / (step + 1e-9), 0.9) < 0.5


def multiplied(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes of a product that the pass has changed."""
    name = "layer.o_proj.weight"
    half = onnx.TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", name], ["y"], transB=1)],
        "product",
        [helper.make_tensor_value_info("x", half, ["n", rows.shape[1]])],
        [helper.make_tensor_value_info("y", half, ["n", len(rows)])],
        [numpy_helper.from_array(rows.astype(np.float16), name)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    model = ir.from_proto(proto)
    assert quantise_products(model) == 1
    assert set(model.graph.initializers) == set(int4_names(name))
    for stored, piece in zip(int4_names(name), INT4.encode(name, rows), strict=True):
        model.graph.initializers[stored].const_value = ir.tensor(piece, name=stored)
    model.opset_imports["com.microsoft"] = 1
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x.astype(np.float16)})
    result: np.ndarray = y
    return result


def test_the_operator_multiplies_with_what_the_bytes_stand_for() -> None:
    rows = blocks_of_all_kinds()
    x = np.random.default_rng(2).standard_normal((5, rows.shape[1]), dtype=np.float32)
    expected = (
        x.astype(np.float16).astype(np.float32) @ dequantise_int4(*quantise_int4("w", rows)).T
    )
    np.testing.assert_allclose(multiplied(rows, x), expected, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("recipe", CUDA_PRECISIONS.values(), ids=CUDA_PRECISIONS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_is_what_is_stored(
    recipe: precision.Precision, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a parameter is stored in many blocks of rows."""
    config = tiny_config(tie_embeddings=tied)
    tables = {name: np.zeros((768, 16), np.float32) for name in ("rope_cos", "rope_sin")}
    parameters = random_weights(config, seed=0) | tables
    whole = dict(store(recipe, parameters.items()))
    layout = recipe.layout(config)
    assert {name: stored.shape for name, stored in layout.items()} == {
        name: piece.shape for name, piece in whole.items()
    }
    assert list(layout) == list(whole)
    monkeypatch.setattr(precision, "BLOCK_ELEMENTS", 1000)
    pieces: dict[str, list[np.ndarray]] = {}
    for name, piece in store(recipe, parameters.items()):
        pieces.setdefault(name, []).append(piece)
    assert len(pieces["model.embed_tokens.weight"]) > 30
    assert list(pieces) == list(whole)
    for name, parts in pieces.items():
        np.testing.assert_array_equal(np.concatenate(parts), whole[name])


def test_int4_keeps_embedding_head_and_norms() -> None:
    layout = INT4.layout(tiny_config(num_layers=1))
    tags = {name: stored.tag for name, stored in layout.items()}
    assert [name for name, tag in tags.items() if tag == "U8"] == [
        f"model.layers.0.{name}.weight.int4" for name in KINDS
    ]
    assert {tags[name] for name in ("lm_head.weight", "model.norm.weight")} == {"F16"}


@pytest.mark.parametrize("recipe", CUDA_PRECISIONS.values(), ids=CUDA_PRECISIONS)
def test_only_the_layers_products_in_16_bits_lie_transposed(recipe: precision.Precision) -> None:
    config = tiny_config(num_layers=2)
    layout = recipe.layout(config)
    turned = set()
    for name, shape in parameter_shapes(config).items():
        if recipe.int4 and name.endswith(PRODUCTS):
            values, scales = (layout[stored] for stored in int4_names(name))
            assert values == ("U8", (shape[0], shape[1] // 32, 16))
            assert scales == ("F16", (shape[0], shape[1] // 32))
        elif layout[name] != (recipe.tag, shape):
            assert layout[name] == (recipe.tag, shape[::-1])
            turned.add(name)
    products = {f"model.layers.{i}.{kind}.weight" for i in range(2) for kind in KINDS}
    assert turned == (products if recipe.weights in ("fp16", "bf16") else set())


def test_columns_that_make_no_blocks_are_refused_with_the_numbers() -> None:
    config = tiny_config(intermediate_size=100)
    with pytest.raises(ExportError, match=r"down_proj\.weight has 100 columns.* multiple of 32"):
        INT4.layout(config)
    FP16.layout(config)


@pytest.mark.parametrize(
    ("target", "name", "chosen"),
    [("cpu", None, "fp32"), ("cuda", None, "fp16"), ("cuda", "bf16", "bf16")],
)
def test_a_target_has_a_default(target: str, name: str | None, chosen: str) -> None:
    recipe = choose_precision(target, name)
    assert (recipe.name, recipe.target) == (chosen, target)


@pytest.mark.parametrize(
    ("target", "name"), [("cpu", "fp16"), ("cuda", "fp32"), ("cuda", "int3"), ("tpu", None)]
)
def test_a_wrong_combination_says_what_is_possible(target: str, name: Any) -> None:
    with pytest.raises(ExportError, match="cpu takes fp32 or int8 or int4; cuda takes fp16"):
        choose_precision(target, name)


@pytest.mark.parametrize("name", [None, "fp32", "int8", "int4"])
def test_an_int8_cache_goes_with_every_precision_of_a_cpu(name: str | None) -> None:
    """And changes nothing of the weights."""
    plain, recipe = choose_precision("cpu", name), choose_precision("cpu", name, "int8")
    assert recipe.name == f"{name or 'fp32'}+int8kv"
    assert recipe is CPU_PRECISIONS[recipe.name]
    assert (plain.dialect.cache_dtype, recipe.dialect.cache_dtype) == ("float32", "int8")
    assert replace(recipe, name=plain.name, cache=None) == plain
    assert slots_precision._CACHES[recipe.name] == "int8"


def test_the_runtime_knows_every_precision_of_a_cpu() -> None:
    caches = {name: recipe.dialect.cache_dtype for name, recipe in CPU_PRECISIONS.items()}
    assert caches == slots_precision._CACHES


@pytest.mark.parametrize("name", [None, "fp16", "bf16", "int4"])
def test_an_fp8_cache_goes_with_every_precision_of_cuda(name: str | None) -> None:
    """And changes nothing of the weights."""
    plain, recipe = choose_precision("cuda", name), choose_precision("cuda", name, "fp8")
    assert plain == choose_precision("cuda", name, "same")
    assert recipe.name == f"{name or 'fp16'}+fp8kv"
    assert recipe is CUDA_PRECISIONS[recipe.name]  # where verify finds what the manifest names
    assert plain.cache is None
    assert plain.dialect.cache_dtype == plain.activations
    assert recipe.dialect.cache_dtype == recipe.cache == "float8e4m3fn"
    assert recipe.dialect.logits_dtype == plain.activations
    assert recipe.weights == plain.weights == plain.name
    assert replace(recipe, name=plain.name, cache=None) == plain


@pytest.mark.parametrize(
    ("target", "kv_cache"), [("cpu", "fp8"), ("tensorrt", "int8"), ("cuda", "int8"), ("cuda", "")]
)
def test_a_cache_that_the_target_lacks_says_what_is_possible(target: str, kv_cache: str) -> None:
    with pytest.raises(
        ExportError, match=f"{kv_cache}.*cpu takes same or int8; cuda takes same or fp8"
    ):
        choose_precision(target, None, kv_cache)


def test_the_runtime_knows_the_types_of_every_precision_of_cuda() -> None:
    recipes = [recipe for recipe in CUDA_PRECISIONS.values() if recipe.target == "cuda"]
    types = {r.name: (r.dialect.logits_dtype, r.dialect.cache_dtype) for r in recipes}
    assert types == cuda_loading._DTYPES


def test_a_gpu_may_be_further_off_with_an_fp8_cache() -> None:
    for recipe in CUDA_PRECISIONS.values():
        if recipe.target == "cuda":
            kind = recipe.dialect.cache_dtype
            wide = device_check.TOLERANCES[kind], device_check.NEAR_TIES[kind]
            assert (wide == (1.0, 0.5)) == (recipe.cache is not None)


def test_an_fp8_cache_is_not_asked_for_by_the_name_of_a_precision() -> None:
    with pytest.raises(ExportError, match="cpu takes fp32 or int8 or int4; cuda takes fp16"):
        choose_precision("cuda", "fp16+fp8kv")


@pytest.mark.parametrize("head_dim", [32, 80, 96, 128])
def test_an_fp8_cache_needs_a_head_dimension_that_its_kernel_has(head_dim: int) -> None:
    config = tiny_config(head_dim=head_dim)
    FP16.check(config)
    recipe = choose_precision("cuda", None, "fp8")
    if head_dim == 128:
        recipe.check(config)
        return
    with pytest.raises(ExportError, match=f"dimension of {head_dim}, .* 64, 128 or 256"):
        recipe.check(config)


def test_the_command_offers_what_there_is() -> None:
    assert set(cli.TARGETS) == set(TARGETS)
    recipes = (CPU_PRECISIONS | CUDA_PRECISIONS).values()
    assert set(cli.PRECISIONS) == {recipe.weights for recipe in recipes}
    assert tuple(map(str, BLOCKS)) == cli.BLOCK_SIZES
    assert set(cli.KV_CACHES) == set(KV_CACHES)


@pytest.mark.parametrize("num_layers", [1, 2, 16, 30])
def test_what_costs_most_in_4_bits_has_8_unless_the_source_is_kept(num_layers: int) -> None:
    config = tiny_config(num_layers=num_layers)
    precision = choose_precision("cpu", "int4")
    weights = precision.host_weights(config)
    assert isinstance(weights, BlockWeights)
    bits = {name: weights.bits(name) for name, shape in weights.shapes.items() if len(shape) > 1}
    downs = [bits[name] == 8 for name in bits if name.endswith("down_proj.weight")]
    assert len(downs) == num_layers
    assert downs[0] or num_layers < 8
    assert downs[-1] or num_layers < 8
    assert 0.3 < sum(downs) / num_layers < 0.7 or num_layers < 3
    few = ("embed_tokens.weight", "lm_head.weight", "qkv_proj.weight")
    assert all((bits[name] == 8) == name.endswith(few) for name in bits if "down" not in name)
    kept = replace(precision, kept=True).host_weights(config)
    assert isinstance(kept, BlockWeights)
    assert {name for name in bits if kept.bits(name) == 8} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
