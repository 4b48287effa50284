"""Migration changes no result, and makes outliers cheaper."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import build_decoder
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.quantise.layers import Layer, parameter_names, take_layer
from llama_export.quantise.rounding import Int4Rounding, Int8Rounding, Rounding
from llama_export.quantise.smoothing import (
    Inputs,
    LayerInputs,
    _balanced,
    best_scales,
    scale_norm,
    scale_up,
    scale_values,
    smooth,
)

CONFIG = tiny_config(num_layers=1)
IDS = torch.arange(40) * 7 % CONFIG.vocab_size


def first_layer(config: LlamaConfig) -> Layer:
    (name, *_) = weights = random_weights(config, seed=3)
    del weights[name]  # the embedding
    return take_layer(iter(weights.items()), 0)


def logits(config: LlamaConfig, layer: Layer) -> Tensor:
    """What the decoder makes of the layer between the other parameters."""
    weights = {name: torch.from_numpy(w) for name, w in random_weights(config, seed=3).items()}
    for field, name in parameter_names(0).items():
        weights[name] = getattr(layer, field)
    count = len(IDS)
    places = (
        torch.arange(count)[None],
        torch.arange(count),
        torch.tensor([count - 1], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        torch.tensor(count, dtype=torch.int32),
    )
    decoder = build_decoder(config, weights.items())
    with torch.no_grad():
        result: Tensor = decoder(IDS, torch.arange(count), places, decoder.empty_cache(1, count))[0]
    return result


def spread(size: int) -> Tensor:
    """Scales from 0.05 to 20."""
    generator = torch.Generator().manual_seed(size)
    return torch.logspace(-1.3, 1.3, size)[torch.randperm(size, generator=generator)]


MOVES: dict[str, Callable[[LlamaConfig, Layer], None]] = {
    "qkv": lambda config, layer: scale_norm(
        layer.input_norm, [layer.qkv], spread(config.hidden_size)
    ),
    "o": lambda config, layer: scale_values(
        config, layer, spread(config.num_kv_heads * config.head_dim)
    ),
    "gate and up": lambda config, layer: scale_norm(
        layer.post_norm, [layer.gate, layer.up], spread(config.hidden_size)
    ),
    "down": lambda config, layer: scale_up(layer, spread(config.intermediate_size)),
}


@pytest.mark.parametrize("link", MOVES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_migration_changes_no_result(link: str, kv_heads: int) -> None:
    config = tiny_config(num_layers=1, num_kv_heads=kv_heads)
    layer, before = first_layer(config), logits(config, first_layer(config))
    MOVES[link](config, layer)
    changed = [
        field
        for field in Layer.__slots__[1:]
        if not torch.equal(getattr(layer, field), getattr(first_layer(config), field))
    ]
    assert len(changed) >= 2 - (link == "o")  # v's rows and o's columns are of two parameters too
    torch.testing.assert_close(logits(config, layer), before, rtol=1e-5, atol=1e-5)


def inputs_of(columns: int, outliers: int = 3) -> Inputs:
    """Rows a few columns of which are 40 times as large."""
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(64, columns, generator=generator)
    rows[:, :outliers] *= 40
    return Inputs(rows.abs().amax(0), rows)


@pytest.mark.parametrize("rounding", [Int8Rounding(), Int4Rounding(32)], ids=["int8", "int4"])
def test_all_links_at_once_change_no_result(rounding: Rounding) -> None:
    layer, before = first_layer(CONFIG), logits(CONFIG, first_layer(CONFIG))
    columns = (layer.qkv, layer.o, layer.gate, layer.down)
    inputs = LayerInputs(*(inputs_of(w.shape[1]) for w in columns))
    smooth(CONFIG, layer, inputs, rounding.activations, rounding.rough)
    for field in Layer.__slots__[1:]:
        assert not torch.equal(getattr(layer, field), getattr(first_layer(CONFIG), field)), field
    torch.testing.assert_close(logits(CONFIG, layer), before, rtol=1e-5, atol=1e-5)


def test_outliers_cost_less_after_migration() -> None:
    rounding = Int8Rounding()
    layer = first_layer(CONFIG)
    inputs = inputs_of(CONFIG.hidden_size)
    scales = best_scales(inputs, [layer.qkv], rounding.activations, rounding.rough)

    def error(scales: Tensor) -> float:
        rows, weights = inputs.rows / scales, layer.qkv * scales
        got = rounding.activations(rows) @ rounding.rough(weights).T
        return float((got - inputs.rows @ layer.qkv.T).square().sum())

    assert error(scales) < 0.3 * error(torch.ones_like(scales))
    assert scales[:3].min() > 2 * scales[3:].median()


def test_going_downhill_makes_less_noise() -> None:
    inputs, weights = inputs_of(64), first_layer(CONFIG).qkv.clone()
    weights[:, 30] *= 20  # an outlier among the weights, whose scale goes the other way
    scales = _balanced(torch.ones(64), inputs.rows, weights, (1, 1))

    def noise(scales: Tensor) -> float:
        rows, columns = inputs.rows / scales, weights * scales
        largest = rows.abs().amax(1).square().sum(), columns.abs().amax(1).square().sum()
        return float(largest[0] * columns.square().sum() + largest[1] * rows.square().sum())

    assert noise(scales) < 0.3 * noise(torch.ones(64))
    assert scales[:3].min() > scales[3:30].max() > scales[30]


def test_where_migration_helps_nothing_there_is_none() -> None:
    rows = torch.ones(8, 64)
    rounding = Int8Rounding()  # all values are those of the grid
    inputs = Inputs(rows.abs().amax(0), rows)
    weights = torch.full((16, 64), 127.0)
    weights[:, 0] = 1
    scales = best_scales(inputs, [weights], rounding.activations, rounding.rough)
    assert torch.equal(scales, torch.ones(64))


def test_columns_that_are_always_zero_keep_their_scale() -> None:
    rounding = Int8Rounding()
    inputs = inputs_of(64)
    inputs.rows[:, 10] = 0
    inputs.peaks[10] = 0
    weights = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weights[:, 20] = 0
    scales = best_scales(inputs, [weights], rounding.activations, rounding.rough)
    assert not torch.equal(scales, torch.ones(64))
    np.testing.assert_array_equal(scales[[10, 20]].numpy(), 1)
