"""A small model whose CPU graph keeps keys and values in 8 bits, and its numpy reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.numpy_llama import Floats, NumpyLlama

if TYPE_CHECKING:
    from llama_decoder.config import LlamaConfig

NO_NUMBER = 258  # the token whose embedding is NaN in the model that tests share
Peaks = dict[str, tuple[Floats, Floats]]  # of keys and values, [K, D], by layer


class WatchedLlama(NumpyLlama):
    """Notes the largest magnitudes of what would be cached."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Floats]) -> None:
        super().__init__(config, weights)
        self.peaks: Peaks = {}

    def _kept(self, layer: str, key: Floats, value: Floats) -> tuple[Floats, Floats]:
        now = [np.abs(part).max(axis=1) for part in (key, value)]
        before = self.peaks.get(layer, (0.0, 0.0))
        self.peaks[layer] = (np.maximum(before[0], now[0]), np.maximum(before[1], now[1]))
        return key, value


class Int8Llama(NumpyLlama):
    """Attends to what is left of keys and values in 8 bits, its own tokens' too.

    Args:
        config: see ``NumpyLlama``.
        weights: see ``NumpyLlama``.
        scales: of keys and values, [K·D] each, by layer.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Floats],
        scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ) -> None:
        super().__init__(config, weights)
        self._scales = scales
        self.steps: dict[str, list[Floats]] = {}  # of keys and values [K, T, D], not yet rounded

    def _kept(self, layer: str, key: Floats, value: Floats) -> tuple[Floats, Floats]:
        kept = []
        self.steps[layer] = []
        for part, scales in zip((key, value), self._scales[layer], strict=True):
            scale = scales.astype(np.float64).reshape(len(part), 1, -1)
            self.steps[layer].append(part / scale)
            kept.append(np.clip(np.rint(part / scale), -128, 127) * scale)
        return kept[0], kept[1]


@dataclass(frozen=True)
class Int8Cached:
    """What ``write_int8_cached`` made.

    Attributes:
        graph: the ONNX file.
        config: the model's numbers.
        scales: every tensor of ``cache_layout``.
        reference: computes what the graph must.
        exact: the same model with a float cache.
    """

    graph: Path
    config: LlamaConfig
    scales: dict[str, np.ndarray]
    reference: Int8Llama
    exact: NumpyLlama


def write_int8_cached(
    directory: Path,
    config: LlamaConfig,
    *,
    seed: int = 3,
    no_numbers: Sequence[int] = (),
) -> Int8Cached:
    """Write a graph of random weights and its weight file.

    Args:
        directory: an existing one.
        config: of the model.
        seed: of the weights and of the text that the scales are made from.
        no_numbers: tokens whose embedding is NaN.
    """
    from llama_decoder.attention import slots_attention
    from llama_decoder.decoder import build_decoder, rope_buffers
    from llama_decoder.tiny import random_weights
    from llama_export.cache_passes import cache_layout, cache_scales, quantise_slots_cache
    from llama_export.trace import save_graph, trace_decoder
    from llama_export.weight_file import float32_layout, weight_regions, write_weights
    from llama_runtime.contract import SLOTS

    weights = random_weights(config, seed)
    named = huggingface_names(config)
    numbers = {name: array.astype(np.float64) for name, array in weights.items()}
    watched = WatchedLlama(named, numbers)
    watched.logits(np.random.default_rng(seed).integers(0, config.vocab_size, 200).tolist())
    scales: dict[str, np.ndarray] = {}
    short = 0.7  # of what is needed, so that some numbers are cut off
    for i in range(config.num_layers):
        peaks = watched.peaks[f"model.layers.{i}"]
        keys, values = (short * part.ravel().astype(np.float32) for part in peaks)
        scales.update(cache_scales(config, i, keys, values))
    tables = {name: table.numpy() for name, table in rope_buffers(config)}
    tensors = weights | tables
    model = trace_decoder(build_decoder(config, tensors.items(), slots_attention), SLOTS)
    assert quantise_slots_cache(model) == config.num_layers
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    layout = float32_layout(shapes) | cache_layout(config)
    regions, weight_file = weight_regions(layout), directory / "model.safetensors"
    list(write_weights(weight_file, layout, (tensors | scales).items()))
    with weight_file.open("r+b") as file:  # what the exporter would refuse to write
        row = np.full(config.hidden_size, np.nan, "<f4").tobytes()
        for token in no_numbers:
            file.seek(regions["model.embed_tokens.weight"].offset + token * len(row))
            file.write(row)
    graph = directory / "decoder.onnx"
    save_graph(model, graph, weight_file.name, regions)
    pairs = {
        f"model.layers.{i}": (scales[f"{place}.k_scale"], scales[f"{place}.v_scale"])
        for i in range(config.num_layers)
        for place in [f"model.layers.{i}.self_attn"]
    }
    reference = Int8Llama(named, numbers, pairs)
    return Int8Cached(graph, config, scales, reference, NumpyLlama(named, numbers))


def huggingface_names(config: LlamaConfig) -> dict[str, Any]:
    """What ``NumpyLlama`` reads of a configuration."""
    numbers = asdict(config)
    return {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        **{name: numbers[name] for name in ("head_dim", "rms_norm_eps", "rope_theta")},
    }
