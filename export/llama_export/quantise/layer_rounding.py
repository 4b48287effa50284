"""Rounds one layer after the other, each on what the rounded ones before it make of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_decoder.config import LlamaConfig
from llama_decoder.rope import rope_tables
from llama_decoder.weights import Array
from llama_export.quantise.gptq import triangle
from llama_export.quantise.layers import (
    Layer,
    attended,
    gated,
    normed,
    parameter_names,
    split_qkv,
    window_parts,
)
from llama_export.quantise.rounding import Product, Rounding


class CacheMaxima(NamedTuple):
    """The largest magnitudes of a layer's cache on the calibration text.

    Attributes:
        keys: after RoPE, float32 [K·D].
        values: float32 [K·D].
    """

    keys: Array
    values: Array


def _ignore(*_: object) -> None:
    """What is called where nobody wants to know."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What a caller may want to know on the way.

    Attributes:
        progress: called with the layers done and the number of layers.
        cache: called with each layer's number and maxima, as they are in the rounded model.
    """

    progress: Callable[[int, int], None] = _ignore
    cache: Callable[[int, CacheMaxima], None] = _ignore


class LayerRounding:
    """The hidden states of all windows, on their way through the layers.

    Args:
        config: the model's numbers.
        rounding: the recipe.
        table: the rounded embedding.
        windows: token ids [W, S].
        watch: whom to tell of each layer's cache.
    """

    def __init__(
        self,
        config: LlamaConfig,
        rounding: Rounding,
        table: Product,
        windows: NDArray[np.int64],
        watch: Watch,
    ) -> None:
        self._config = config
        self._rounding = rounding
        self._watch = watch
        tokens, places = np.unique(windows, return_inverse=True)
        rows = table.taken(tokens).dequantise()
        self.hidden = torch.from_numpy(rows)[
            torch.from_numpy(places.reshape(windows.shape))
        ]  # [W, S, E]
        self._tables = rope_tables(config, windows.shape[1])

    @torch.inference_mode()
    def rounded(self, layer: Layer) -> Iterator[tuple[str, Product | Array]]:
        """The layer's parameters in their order; its float32 weights are used up on the way."""
        name = parameter_names(layer.index)
        self._rounding.prepare(layer)
        yield name["input_norm"], layer.input_norm.numpy()
        yield name["qkv"], self._round_qkv(layer, name["qkv"])
        yield name["o"], self._round_o(layer, name["o"])
        yield name["post_norm"], layer.post_norm.numpy()
        yield from self._round_mlp(layer, name)

    def _round_qkv(self, layer: Layer, name: str) -> Product:
        gram = _Gram(layer.qkv)
        for part in window_parts(self.hidden):
            gram.add(self._normed(part, layer.input_norm))
        product = self._rounding.feedback(name, layer.qkv, gram.triangle(name))
        layer.qkv = torch.from_numpy(product.dequantise())
        return product

    def _round_o(self, layer: Layer, name: str) -> Product:
        gram = _Gram(layer.o)
        context = torch.empty(*self.hidden.shape[:2], layer.o.shape[1])
        peaks = [torch.zeros(self._config.num_kv_heads, self._config.head_dim) for _ in range(2)]
        for part in window_parts(self.hidden):
            qkv = self._normed(part, layer.input_norm) @ layer.qkv.T
            query, *cache = split_qkv(self._config, qkv, *self._tables)
            peaks = [
                torch.maximum(peak, new.abs().amax((0, 2)))
                for peak, new in zip(peaks, cache, strict=True)
            ]
            context[part] = self._rounding.of_context(attended(query, *cache))
            gram.add(context[part])
        self._watch.cache(layer.index, CacheMaxima(*(peak.flatten().numpy() for peak in peaks)))
        product = self._rounding.feedback(name, layer.o, gram.triangle(name))
        self._add(context, product)
        return product

    def _round_mlp(self, layer: Layer, name: dict[str, str]) -> Iterator[tuple[str, Product]]:
        gram = _Gram(layer.gate)
        for part in window_parts(self.hidden):
            gram.add(self._normed(part, layer.post_norm))
        factor = gram.triangle(name["gate"])
        for field in ("gate", "up"):
            product = self._rounding.feedback(name[field], getattr(layer, field), factor)
            setattr(layer, field, torch.from_numpy(product.dequantise()))
            yield name[field], product
        del factor, product
        gram = _Gram(layer.down)
        inner = torch.empty(*self.hidden.shape[:2], layer.down.shape[1])
        for part in window_parts(self.hidden):
            x = self._normed(part, layer.post_norm)
            inner[part] = self._rounding.of_inner(gated(x @ layer.gate.T, x @ layer.up.T))
            gram.add(inner[part])
        del layer.gate, layer.up  # with a wide MLP there is need of their memory now
        factor = gram.triangle(name["down"])
        product = self._rounding.feedback(name["down"], layer.down, factor)
        self._add(inner, product)
        yield name["down"], product

    def _normed(self, part: slice, weight: Tensor) -> Tensor:
        return self._rounding.of_norm(normed(self.hidden[part], weight, self._config))

    def _add(self, inputs: Tensor, product: Product) -> None:
        weights = torch.from_numpy(product.dequantise())
        for part in window_parts(self.hidden):
            self.hidden[part] += inputs[part] @ weights.T


class _Gram:
    """The mean of the outer products of the rows that go into a product."""

    def __init__(self, weights: Tensor) -> None:
        self._sum = torch.zeros(weights.shape[1], weights.shape[1])
        self._count = 0

    def add(self, x: Tensor) -> None:
        """Count rows [..., K]."""
        rows = x.flatten(0, -2)
        self._sum.addmm_(rows.T, rows)
        self._count += len(rows)

    def triangle(self, name: str) -> Tensor:
        """See ``gptq.triangle``; the sum is used up."""
        return triangle(name, self._sum.div_(self._count))
