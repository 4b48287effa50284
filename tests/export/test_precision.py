"""What is stored is what torch's own casts make of it, in the place that the layout says."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama_decoder.tiny import random_weights, tiny_config
from llama_decoder.weights import parameter_shapes
from llama_export import device_check, precision
from llama_export.encoders import int4_names
from llama_export.errors import ExportError
from llama_export.host_weights import BlockWeights
from llama_export.precision import PRODUCTS, in_file_order, store
from llama_export.precisions import CUDA_PRECISIONS, choose_precision

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


@pytest.mark.parametrize("recipe", [FP16, INT4], ids=["fp16", "int4"])
def test_a_tensor_is_forgotten_before_the_next_is_read(recipe: precision.Precision) -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for layer in range(3):
            assert all(ref() is None for ref in alive)
            tensor = np.zeros((64, 32), np.float32)
            alive.append(weakref.ref(tensor))
            pair = f"model.layers.{layer}.mlp.down_proj.weight", tensor
            del tensor
            yield pair
            del pair

    assert len(list(store(recipe, tensors()))) == 3 * (1 + recipe.int4)


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


def test_a_gpu_may_be_further_off_with_an_fp8_cache() -> None:
    for recipe in CUDA_PRECISIONS.values():
        if recipe.target == "cuda":
            kind = recipe.dialect.cache_dtype
            wide = device_check.TOLERANCES[kind], device_check.NEAR_TIES[kind]
            assert (wide == (1.0, 0.5)) == (recipe.cache is not None)


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
