"""The largest keys and values of a model whose weights are not rounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llama_decoder.config import LlamaConfig
from llama_decoder.names import EMBEDDING
from llama_decoder.rope import rope_tables
from llama_export.quantise.layer_rounding import CacheMaxima
from llama_export.quantise.layers import (
    Parameters,
    Windows,
    attended,
    go_on,
    normed,
    split_qkv,
    take,
    take_layer,
    window_parts,
)
from llama_export.quantise.quantiser import checked_windows


@torch.inference_mode()
def cache_maxima(
    config: LlamaConfig, weights: Parameters, windows: Windows
) -> Iterator[tuple[int, CacheMaxima]]:
    """Run a text through the layers, one in memory at a time.

    Args:
        config: the model's numbers.
        weights: every parameter in float32, in the decoder's order.
        windows: token ids [W, S] of the calibration text.

    Yields:
        A layer's number and its maxima.

    Raises:
        ExportError: a parameter isn't the expected one or not finite, or the text is too short.
    """
    windows = checked_windows(windows, config)
    hidden = torch.from_numpy(take(weights, EMBEDDING)[windows])  # [W, S, E]
    tables = rope_tables(config, windows.shape[1])
    for index in range(config.num_layers):
        layer = take_layer(weights, index)
        peaks = torch.zeros(2, config.num_kv_heads, config.head_dim)
        for part in window_parts(hidden):
            x = normed(hidden[part], layer.input_norm, config)
            query, *cache = split_qkv(config, x @ layer.qkv.T, *tables)
            found = torch.stack([new.abs().amax((0, 2)) for new in cache])
            peaks = torch.maximum(peaks, found)
            go_on(config, layer, hidden[part], attended(query, *cache))
        keys, values = (peak.flatten().numpy() for peak in peaks)
        yield index, CacheMaxima(keys, values)
