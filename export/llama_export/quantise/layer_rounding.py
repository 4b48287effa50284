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
from llama_export.quantise.smoothing import (
    EXTREME_ROWS,
    SAMPLE_ROWS,
    SEEN_TOKENS,
    Inputs,
    LayerInputs,
    smooth,
)


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
        cache: called with each layer's number and maxima, as they are after its migrations.
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
        divisors: [E], of what is looked up in the embedding; None for 1.
    """

    def __init__(
        self,
        config: LlamaConfig,
        rounding: Rounding,
        table: Product,
        windows: NDArray[np.int64],
        watch: Watch,
        divisors: Array | None,
    ) -> None:
        self._config = config
        self._rounding = rounding
        self._watch = watch
        tokens, places = np.unique(windows, return_inverse=True)
        rows = table.taken(tokens).dequantise()
        if divisors is not None:
            rows /= divisors
        self.hidden = torch.from_numpy(rows)[
            torch.from_numpy(places.reshape(windows.shape))
        ]  # [W, S, E]
        self._tables = rope_tables(config, windows.shape[1])
        # Migration looks at some windows, evenly apart, and at some of their rows.
        step = max(1, windows.size // SEEN_TOKENS)
        self._seen = slice(None, None, step)
        seen = windows[self._seen]
        order = torch.randperm(seen.size, generator=torch.Generator().manual_seed(0))
        sampled = torch.zeros(seen.size, dtype=torch.bool)
        sampled[order[:SAMPLE_ROWS]] = True
        self._sampled = sampled.view(seen.shape)

    @torch.inference_mode()
    def rounded(self, layer: Layer) -> Iterator[tuple[str, Product | Array]]:
        """The layer's parameters in their order; its float32 weights are used up on the way."""
        name = parameter_names(layer.index)
        if self._rounding.migrates:
            recipe = self._rounding.activations, self._rounding.rough
            smooth(self._config, layer, self._inputs(layer), *recipe)
        yield name["input_norm"], layer.input_norm.numpy()
        yield name["qkv"], self._round_qkv(layer, name["qkv"])
        yield name["o"], self._round_o(layer, name["o"])
        yield name["post_norm"], layer.post_norm.numpy()
        yield from self._round_mlp(layer, name)

    def _inputs(self, layer: Layer) -> LayerInputs:
        """What goes into the products of a layer that isn't rounded yet."""
        seen = [_Seen() for _ in LayerInputs._fields]
        states = self.hidden[self._seen]
        for part in window_parts(states):
            chosen = self._sampled[part]
            hidden = states[part]
            x = normed(hidden, layer.input_norm, self._config)
            seen[0].add(x, chosen)
            rows = attended(*split_qkv(self._config, x @ layer.qkv.T, *self._tables))
            hidden = hidden + rows @ layer.o.T
            seen[1].add(rows / _size(hidden), chosen)
            x = normed(hidden, layer.post_norm, self._config)
            seen[2].add(x, chosen)
            rows = gated(x @ layer.gate.T, x @ layer.up.T)
            seen[3].add(rows / _size(hidden + rows @ layer.down.T), chosen)
        return LayerInputs(*(each.inputs() for each in seen))

    def _round_qkv(self, layer: Layer, name: str) -> Product:
        gram = _Gram(layer.qkv)
        for part in window_parts(self.hidden):
            gram.add(self._normed(part, layer.input_norm))
        product = self._rounding.feedback(layer.qkv, gram.triangle(name))
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
            context[part] = self._rounding.activations(attended(query, *cache))
            gram.add(context[part])
        self._watch.cache(layer.index, CacheMaxima(*(peak.flatten().numpy() for peak in peaks)))
        product = self._rounding.feedback(layer.o, gram.triangle(name))
        self._add(context, product)
        return product

    def _round_mlp(self, layer: Layer, name: dict[str, str]) -> Iterator[tuple[str, Product]]:
        gram = _Gram(layer.gate)
        for part in window_parts(self.hidden):
            gram.add(self._normed(part, layer.post_norm))
        factor = gram.triangle(name["gate"])
        for field in ("gate", "up"):
            product = self._rounding.feedback(getattr(layer, field), factor)
            setattr(layer, field, torch.from_numpy(product.dequantise()))
            yield name[field], product
        del factor, product
        gram = _Gram(layer.down)
        inner = torch.empty(*self.hidden.shape[:2], layer.down.shape[1])
        for part in window_parts(self.hidden):
            x = self._normed(part, layer.post_norm)
            inner[part] = self._rounding.activations(gated(x @ layer.gate.T, x @ layer.up.T))
            gram.add(inner[part])
        del layer.gate, layer.up  # with a wide MLP there is need of their memory now
        product = self._rounding.feedback(layer.down, gram.triangle(name["down"]))
        self._add(inner, product)
        yield name["down"], product

    def _normed(self, part: slice, weight: Tensor) -> Tensor:
        return self._rounding.activations(normed(self.hidden[part], weight, self._config))

    def _add(self, inputs: Tensor, product: Product) -> None:
        weights = torch.from_numpy(product.dequantise())
        for part in window_parts(self.hidden):
            self.hidden[part] += inputs[part] @ weights.T


def _size(hidden: Tensor) -> Tensor:
    """The root of the mean square of each row [..., E], as [..., 1].

    The next norm divides by it. So migration weighs what is added to hidden states with 1 over it:
    else the few tokens with enormous ones would have all the say.
    """
    return hidden.square().mean(-1, keepdim=True).sqrt_().clamp_(min=torch.finfo().tiny)


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


class _Seen:
    """Sizes and some of the rows of what goes into a product."""

    def __init__(self) -> None:
        self._sizes: list[Tensor] = []
        self._rows: list[Tensor] = []

    def add(self, x: Tensor, chosen: Tensor) -> None:
        """Rows [W, S, K], of which some are kept, chosen by bool [W, S], and the most extreme.

        Few tokens hold enormous activations, and all others attend to them: a sample must not be
        without them.
        """
        self._sizes.append(x.abs().amax((0, 1)))
        rows = x.flatten(0, 1)
        largest = rows.abs().amax(1).topk(min(EXTREME_ROWS, len(rows))).indices
        self._rows += [x[chosen], rows[largest]]

    def inputs(self) -> Inputs:
        """What was seen."""
        return Inputs(torch.stack(self._sizes).amax(0), torch.cat(self._rows))
