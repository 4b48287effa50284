"""One layer's weights at a time, and its forward over the windows of the calibration text.

The arithmetic is that of ``llama_decoder.decoder``, here in pieces, so that what goes into each
product can be looked at before the product is rounded. Hidden states are [W, S, E]: W windows of S
tokens, each a text of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from llama_decoder import names
from llama_decoder.config import LlamaConfig
from llama_decoder.weights import Array
from llama_export.errors import ExportError

ROWS_AT_ONCE = 2048  # tokens whose wide activations are in memory together

Parameters = Iterator[tuple[str, Array]]
Windows = NDArray[np.int64]  # token ids [W, S]


@dataclass(slots=True)
class Layer:
    """The float32 parameters of one layer, in the decoder's order.

    Attributes:
        index: which layer.
        input_norm: [E].
        qkv: [(H + 2K)·D, E].
        o: [E, H·D].
        post_norm: [E].
        gate: [I, E].
        up: [I, E].
        down: [E, I].
    """

    index: int
    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


FIELDS = ("input_norm", "qkv", "o", "post_norm", "gate", "up", "down")


def parameter_names(layer: int) -> dict[str, str]:
    """The parameter behind each field of a ``Layer``."""
    return {field: row.name.format(i=layer) for field, row in zip(FIELDS, names.LAYER, strict=True)}


def take(given: Parameters, name: str) -> Array:
    """The next parameter, which must be the one of that name.

    Raises:
        ExportError: it isn't, or holds values that aren't finite.
    """
    given_name, value = next(given, ("no more", np.empty(0, np.float32)))
    if given_name != name:
        raise ExportError(f"expected the weights {name}, got {given_name}")
    if not np.isfinite(value).all():
        raise ExportError(f"the weights {name} hold values that are not finite numbers")
    return value


def take_layer(given: Parameters, index: int) -> Layer:
    """The next layer, in memory of its own; see ``take``."""
    fields = {
        field: torch.from_numpy(np.array(take(given, name), np.float32))
        for field, name in parameter_names(index).items()
    }
    return Layer(index, **fields)


def normed(hidden: Tensor, weight: Tensor, config: LlamaConfig) -> Tensor:
    """RMSNorm of [..., E]."""
    return F.rms_norm(hidden, weight.shape, weight, config.rms_norm_eps)


def split_qkv(config: LlamaConfig, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [W, heads, S, D] of [W, S, (H + 2K)·D], turned by RoPE.

    Args:
        config: the model's numbers.
        qkv: the projections.
        cos: [S, D/2].
        sin: [S, D/2].
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    cells = qkv.view(*qkv.shape[:-1], -1, config.head_dim).transpose(1, 2)
    query, key, value = torch.split(cells, [heads, kv_heads, kv_heads], dim=1)
    return _turned(query, cos, sin), _turned(key, cos, sin), value


def attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention within each window, [W, S, H·D]."""
    rows = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return rows.transpose(1, 2).flatten(2)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product, which goes into down."""
    return F.silu(gate).mul_(up)


def pass_layer(
    config: LlamaConfig, layer: Layer, hidden: Tensor, tables: tuple[Tensor, Tensor]
) -> None:
    """Send hidden states [W, S, E] through a layer, in place.

    Args:
        config: the model's numbers.
        layer: its weights as they are.
        hidden: before it, and after it.
        tables: of RoPE, [S, D/2] each.
    """
    for part in window_parts(hidden):
        x = normed(hidden[part], layer.input_norm, config)
        context = attended(*split_qkv(config, x @ layer.qkv.T, *tables))
        go_on(config, layer, hidden[part], context)


def go_on(config: LlamaConfig, layer: Layer, hidden: Tensor, context: Tensor) -> None:
    """What a layer does behind its attention, in place.

    Args:
        config: the model's numbers.
        layer: its weights as they are.
        hidden: [W, S, E], before the layer and after it.
        context: what attention gave, [W, S, H·D].
    """
    hidden += context @ layer.o.T
    x = normed(hidden, layer.post_norm, config)
    hidden += gated(x @ layer.gate.T, x @ layer.up.T) @ layer.down.T


def window_parts(hidden: Tensor) -> list[slice]:
    """Windows that go through a layer together."""
    step = max(1, ROWS_AT_ONCE // hidden.shape[1])
    return [slice(start, start + step) for start in range(0, len(hidden), step)]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
