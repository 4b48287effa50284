"""Keys and values in 8 bits: the graph, and what the weight file holds for it.

On CUDA they are float8e4m3fn, with a scale of 1. On the CPU they are int8: a number is stored as
what it is in steps of its scale, and each channel of each head has a scale for its keys and one for
its values. Scales are made once, from the largest magnitudes that a text brings about, and are the
same in every step: so what is cached of a token doesn't depend on who runs beside it. Per channel
and per layer cost the operator the same time.

RoPE turns two channels of a key against each other, by an angle that grows with the position. A
text of short windows shows few angles of most pairs; further on one channel becomes as large as
the pair is long. So the scale of a key's channel is that of its pair.

Shape letters are those of ``llama_runtime.contract``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from llama_decoder.config import LlamaConfig
from llama_export.errors import ExportError
from llama_export.graph_edits import initializer, registered
from llama_export.weight_file import Stored

KV_SCALE = "kv_scale"  # the one number of an fp8 graph's own: float32 [1], and that is 1
INT8_CACHE_HEADS = 16  # a head dimension is a multiple of it, or the operator refuses it
STEPS = 127  # from 0 to the largest magnitude that a scale provides for
# What the text's largest magnitude is multiplied with. More of it costs precision everywhere, less
# lets more numbers of other texts be cut off.
MARGIN = 1.0
LEAST_SHARE = 1 / 1000  # of a layer's largest scale: what a channel gets that the text left at 0

_PARTS = ("k", "v")


def cache_scale_names(layer: int) -> tuple[str, str]:
    """The tensors with the scales of a layer's keys and values."""
    key, value = (f"model.layers.{layer}.self_attn.{part}_scale" for part in _PARTS)
    return key, value


def cache_layout(config: LlamaConfig) -> dict[str, Stored]:
    """Every tensor with scales, [K·D] of float32 each, in file order.

    Raises:
        ExportError: the operator takes no such head dimension.
    """
    if config.head_dim % INT8_CACHE_HEADS:
        raise ExportError(
            f"the model has a head dimension of {config.head_dim}, and an int8 cache needs a "
            f"multiple of {INT8_CACHE_HEADS}: build with --kv-cache same"
        )
    scales = Stored("F32", (config.num_kv_heads * config.head_dim,))
    layers = map(cache_scale_names, range(config.num_layers))
    return {name: scales for names in layers for name in names}


def cache_scales(
    config: LlamaConfig, layer: int, keys: NDArray[np.float32], values: NDArray[np.float32]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """A layer's scales, by the names of ``cache_layout``.

    Args:
        config: the model's numbers.
        layer: which one.
        keys: [K·D], the largest magnitudes of its keys after RoPE on a text of any positions.
        values: [K·D], those of its values.

    Raises:
        ExportError: a magnitude is negative or not a number, or there are not so many.
    """
    names = cache_scale_names(layer)
    for name, peaks in zip(names, (keys, values), strict=True):
        if peaks.shape != (config.num_kv_heads * config.head_dim,):
            raise ExportError(f"{name} can't be made from magnitudes of the shape {peaks.shape}")
        if not np.isfinite(peaks).all() or (peaks < 0).any():
            raise ExportError(f"{name} can't be made: a magnitude of the cache is not a number")
    for name, reach in zip(names, (_reach(config, keys), values), strict=True):
        scales = np.float32(MARGIN / STEPS) * reach.astype(np.float32)
        least = np.float32(LEAST_SHARE) * scales.max()
        yield name, np.maximum(scales, least if least else 1).astype(np.float32)


def _reach(config: LlamaConfig, keys: NDArray[np.float32]) -> NDArray[np.float32]:
    """How large each channel of a key can be at any position: as large as its pair is long.

    No pair is longer than its channels' largest magnitudes would make it, were they of one token.
    """
    first, second = np.split(keys.reshape(config.num_kv_heads, config.head_dim), 2, axis=1)
    length = np.hypot(first, second)
    return np.concatenate((length, length), axis=1).ravel()


def quantise_slots_cache(model: ir.Model) -> int:
    """Let GroupQueryAttention keep keys and values in 8 bits, with a scale a channel.

    The scales become initializers of the names of ``cache_scale_names``; the numbers lie in the
    weight file.

    Source: the operator's schema in ONNX Runtime 1.32 (docs/ContribOperators.md).

    Args:
        model: changed in place; layers are in order.

    Returns:
        How many attentions were changed.
    """
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for layer, node in enumerate(attentions):
        caches = [value for value in (*node.inputs[3:5], *node.outputs[1:3]) if value is not None]
        for value in caches:
            value.type = ir.TensorType(ir.DataType.INT8)
        axes = ir.Shape(caches[0].shape or ())  # [B, K, C, D]
        channels = int(axes[1]) * int(axes[3])
        for part, place, name in zip(_PARTS, (12, 13), cache_scale_names(layer), strict=True):
            node.replace_input_with(place, initializer(model, name, Stored("F32", (channels,))))
            node.attributes.add(ir.AttrString(f"{part}_quant_type", "PER_CHANNEL"))
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
    return len(attentions)


def quantise_paged_cache(model: ir.Model) -> int:
    """Let PagedAttention keep keys and values in 8 bits, as float8e4m3fn.

    What is stored is divided by a scale. That of all layers is 1, as in vLLM unless it is told: the
    type reaches 448, which keys and values of Llamas lie far below, and its 3 bits of mantissa are
    as exact for all numbers down to 2^-6.

    Source: the operator's schema in ONNX Runtime 1.31 (docs/ContribOperators.md).

    Args:
        model: changed in place.

    Returns:
        How many attentions were changed.
    """
    attentions = [node for node in model.graph if node.op_type == "PagedAttention"]
    for node in attentions:
        for value in (*node.inputs[3:5], *node.outputs[1:]):
            if value is not None:
                value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        for part, place in (("k", 14), ("v", 15)):
            node.replace_input_with(place, registered(model, KV_SCALE, np.ones(1, np.float32)))
            node.attributes.add(ir.AttrString(f"{part}_quant_type", "PER_TENSOR"))
    return len(attentions)
