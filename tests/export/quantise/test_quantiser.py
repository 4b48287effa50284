"""The quantiser's pass over a model: what comes out, in which order, from how little memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import build_decoder
from llama_decoder.names import LAST_NORM
from llama_decoder.tiny import random_weights, tiny_config
from llama_decoder.weights import parameter_shapes
from llama_export.errors import ExportError
from llama_export.quantise import layers as layers_module
from llama_export.quantise.codes import BlockProduct, Int8Product
from llama_export.quantise.grids import nearest_channels
from llama_export.quantise.layer_rounding import CacheMaxima, LayerRounding, Watch
from llama_export.quantise.layers import Layer, normed, take, take_layer
from llama_export.quantise.quantiser import MIN_TOKENS, How, quantise_int4, quantise_int8
from llama_export.quantise.rotation import Rotation, turn_blocks
from llama_export.quantise.rounding import HEAD_TURN, Int8Rounding, Product

CONFIG = tiny_config()
NORM = "model.layers.1.post_attention_layernorm.weight"


def outlying_weights(config: LlamaConfig = CONFIG) -> dict[str, np.ndarray]:
    """Random weights whose norms make a few channels much larger than the others."""
    weights = random_weights(config, seed=5)
    for name, value in weights.items():
        if value.ndim == 1 and "layers" in name:
            value[[3, 40]] *= 25
    return weights


def windows(config: LlamaConfig = CONFIG, count: int = 64, length: int = 64) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.zipf(1.3, (count, length)).clip(max=config.vocab_size) - 1


def logits(config: LlamaConfig, weights: dict[str, np.ndarray], ids: np.ndarray) -> Tensor:
    """The decoder's, and the cache it leaves."""
    count = len(ids)
    places = (
        torch.arange(count)[None],
        torch.arange(count),
        torch.tensor([count - 1], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        torch.tensor(count, dtype=torch.int32),
    )
    decoder = build_decoder(config, weights.items())
    cache = decoder.empty_cache(1, count)
    with torch.no_grad():
        result: Tensor = decoder(torch.from_numpy(ids), torch.arange(count), places, cache)[0]
    return result


def dequantised(stream: Iterator[tuple[str, Product | np.ndarray]]) -> dict[str, np.ndarray]:
    return {
        name: value if isinstance(value, np.ndarray) else value.dequantise()
        for name, value in stream
    }


@pytest.mark.parametrize("how", ["feedback", "nearest"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_comes_in_its_order(how: How, tied: bool) -> None:
    config = tiny_config(tie_embeddings=tied)
    for stream, kind in (
        (quantise_int8(config, iter(outlying_weights(config).items()), windows(), how), 0),
        (quantise_int4(config, iter(outlying_weights(config).items()), windows(), 32, how), 1),
    ):
        given = dict(stream)
        shapes = parameter_shapes(config)
        if tied and kind == 0:
            turn = given.pop(HEAD_TURN)
            assert isinstance(turn, np.ndarray)
            assert turn.shape == (config.hidden_size,) * 2
        assert list(given) == list(shapes)
        for name, value in given.items():
            if len(shapes[name]) == 1:
                assert isinstance(value, np.ndarray)
                assert value.dtype == np.float32
                assert value.shape == shapes[name]
                continue
            assert isinstance(value, (Int8Product, BlockProduct)[kind])
            assert value.codes.shape == shapes[name]
            if isinstance(value, BlockProduct):
                wide = name in ("model.embed_tokens.weight", "lm_head.weight")
                assert (value.bits, value.block) == (8 if wide else 4, 32)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_feedback_costs_less_than_the_nearest_in_4_bits(block: int) -> None:
    ids = windows(count=1, length=200)[0]
    expected = logits(CONFIG, outlying_weights(), ids)
    errors = []
    for how in ("feedback", "nearest"):
        stream = quantise_int4(CONFIG, iter(outlying_weights().items()), windows(), block, how)
        errors.append(float((logits(CONFIG, dequantised(stream), ids) - expected).square().mean()))
    assert errors[0] < 0.7 * errors[1]


class Exact(Int8Rounding):
    """Rounds nothing, so that what is left is the turned model."""

    def of_norm(self, rows: Tensor) -> Tensor:
        return rows

    def of_context(self, rows: Tensor) -> Tensor:
        return rows

    def of_inner(self, rows: Tensor) -> Tensor:
        return turn_blocks(rows)

    def feedback(self, name: str, weights: Tensor, factor: Tensor) -> Product:  # noqa: ARG002
        assert factor.shape == (weights.shape[1], weights.shape[1])
        return _Kept(weights.numpy())

    def table(self, rows: np.ndarray, norm: np.ndarray | None = None) -> Product:
        weight = None if norm is None else torch.from_numpy(norm)
        return _Kept(self.rotation.table(torch.from_numpy(rows), weight).numpy())


class _Kept(Int8Product):
    """Stands for the very rows."""

    def __init__(self, rows: np.ndarray) -> None:
        object.__setattr__(self, "codes", rows)

    def dequantise(self) -> np.ndarray:
        return self.codes

    def taken(self, rows: np.ndarray) -> Int8Product:
        return _Kept(self.codes[rows])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_turned_forward_is_the_decoders(
    kv_heads: int, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "ROWS_AT_ONCE", 96)  # two windows at once, then one
    # Sizes of 24 and 40 have no Hadamard matrix.
    config = tiny_config(
        num_kv_heads=kv_heads, num_layers=3, head_dim=24, intermediate_size=40, tie_embeddings=tied
    )
    ids = windows(count=5, length=48)
    weights = outlying_weights(config)
    weights["model.norm.weight"][[3, 40]] *= 25
    seen: list[CacheMaxima] = []
    watch = Watch(cache=lambda _, maxima: seen.append(maxima))
    given = iter(weights.items())
    exact = Exact(Rotation(config))
    table = exact.table(take(given, "model.embed_tokens.weight"))
    rounding = LayerRounding(config, exact, table, ids, watch)
    for index in range(config.num_layers):
        for name, value in rounding.rounded(take_layer(given, index)):
            kept = value if isinstance(value, np.ndarray) else value.dequantise()
            assert kept.shape == weights[name].shape
    norm = take(given, LAST_NORM)
    (_, ones), *turns = exact.last_norm(norm, tied)
    head = table if tied else exact.table(take(given, "lm_head.weight"), norm)
    decoder = build_decoder(config, weights.items())
    keys = torch.zeros(config.num_layers, kv_heads, config.head_dim)
    for window, hidden in zip(torch.from_numpy(ids), rounding.hidden, strict=True):
        count = len(window)
        places = (
            torch.arange(count)[None],
            torch.arange(count),
            torch.tensor([count - 1], dtype=torch.int32),
            torch.tensor([count], dtype=torch.int32),
            torch.tensor(count, dtype=torch.int32),
        )
        cache = decoder.empty_cache(1, count)
        with torch.no_grad():
            expected, present = decoder(window, torch.arange(count), places, cache)
        rows = normed(hidden, torch.from_numpy(ones), config)
        for _, turn in turns:
            rows = rows @ torch.from_numpy(turn)
        got = rows @ torch.from_numpy(head.dequantise()).T
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
        latest = torch.stack([key.abs().amax((0, 2)) for key, _ in present])
        keys = torch.maximum(keys, latest)
    for layer, maxima in enumerate(seen):
        np.testing.assert_allclose(maxima.keys, keys[layer].flatten(), rtol=1e-4)
    assert len(seen) == config.num_layers
    assert len(turns) == tied


def test_int8_of_a_model_with_outliers_is_better_turned() -> None:
    """Against the same weights rounded to the nearest as they are, activations too."""
    ids = windows(count=1, length=200)
    weights = random_weights(CONFIG, seed=5)
    for layer in range(CONFIG.num_layers):  # what the residual stream gets has few large channels
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{writer}.weight"][[3, 40]] *= 25
    rounded: list[Tensor] = []
    turned = Int8Rounding(Rotation(CONFIG))
    for rounding in (Exact(Rotation(CONFIG)), turned, _AsItIs(Rotation(CONFIG))):
        given = iter(weights.items())
        table = rounding.table(take(given, "model.embed_tokens.weight"))
        layers = LayerRounding(CONFIG, rounding, table, ids, Watch())
        for index in range(CONFIG.num_layers):
            list(layers.rounded(take_layer(given, index)))
        states = layers.hidden
        if isinstance(rounding, _AsItIs):
            states = rounding.rotation.table(states)
        rounded.append(states)
    exact, *others = rounded
    errors = [float((states - exact).square().sum(-1).median()) for states in others]
    assert errors[0] < 0.5 * errors[1]


class _AsItIs(Int8Rounding):
    """Turns nothing."""

    def prepare(self, layer: Layer) -> None:
        """Leave it."""

    def of_norm(self, rows: Tensor) -> Tensor:
        return self.of_context(rows)

    def of_inner(self, rows: Tensor) -> Tensor:
        return self.of_context(rows)

    def table(self, rows: np.ndarray, norm: np.ndarray | None = None) -> Product:
        assert norm is None
        return nearest_channels(rows)


def test_one_layer_is_in_memory_at_a_time() -> None:
    config = tiny_config(num_layers=5)
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def watched() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal most
        for name, shape in parameter_shapes(config).items():
            most = max(most, sum(ref() is not None for ref in alive))
            value = np.full(shape, 0.01, np.float32)
            alive.append(weakref.ref(value))
            yield name, value

    for _ in quantise_int8(config, watched(), windows()):
        pass
    assert most <= 8  # of the 38 parameters


@pytest.mark.parametrize("how", ["feedback", "nearest"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_weights_of_no_numbers_are_named(how: How, wrong: float) -> None:
    weights = outlying_weights()
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", NORM):
        kept = weights[name].flat[7]
        weights[name].flat[7] = wrong
        with pytest.raises(ExportError, match=f"the weights {name} hold values that are not"):
            list(quantise_int4(CONFIG, iter(weights.items()), windows(), 32, how))
        weights[name].flat[7] = kept


def test_parameters_out_of_order_are_refused() -> None:
    weights = list(outlying_weights().items())
    with pytest.raises(ExportError, match=r"expected the weights .*o_proj\.weight, got .*gate"):
        list(quantise_int8(CONFIG, iter([*weights[:3], *weights[5:]]), windows()))
    with pytest.raises(ExportError, match=r"expected the weights lm_head\.weight, got no more"):
        list(quantise_int8(CONFIG, iter(weights[:-1]), windows()))


def test_a_text_that_can_not_serve_is_refused() -> None:
    def quantise(text: np.ndarray | None) -> None:
        next(iter(quantise_int8(CONFIG, iter(outlying_weights().items()), text)))

    short = windows(count=3)
    with pytest.raises(ExportError, match=f"has 192 tokens .* needs {MIN_TOKENS:,}"):
        quantise(short)
    with pytest.raises(ExportError, match="needs a calibration text"):
        quantise(None)
    other = windows()
    other[9, 9] = 512
    with pytest.raises(ExportError, match="token ids from 0 to 512, and the model knows 0 to 511"):
        quantise(other)


def test_progress_counts_layers() -> None:
    steps: list[tuple[int, int]] = []
    watch = Watch(progress=lambda done, total: steps.append((done, total)))
    list(quantise_int8(CONFIG, iter(outlying_weights().items()), None, "nearest", watch))
    assert steps == [(1, 2), (2, 2)]
