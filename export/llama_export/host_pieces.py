"""From a source's float32 parameters to the tensors of a bundle for the CPU that is rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llama_decoder.config import LlamaConfig
from llama_decoder.weights import Array
from llama_export.cache_passes import cache_scales
from llama_export.host_weights import BlockWeights, Int8Weights, Quantised
from llama_export.precision import Precision, store
from llama_export.quantise.cache_maxima import cache_maxima
from llama_export.quantise.layer_rounding import CacheMaxima, Watch
from llama_export.quantise.layers import Parameters, Windows
from llama_export.quantise.quantiser import How, checked_windows, quantise_int4, quantise_int8
from llama_export.weight_file import Piece

RANDOM_MAXIMUM = 6.0  # of keys and values where weights are random: those are about normal


def host_pieces(
    config: LlamaConfig,
    precision: Precision,
    parameters: Callable[[], Parameters],
    tables: Iterable[tuple[str, Array]],
    windows: Windows | None,
    kept: Iterator[tuple[str, Quantised]] | None = None,
) -> Iterator[tuple[str, Piece]]:
    """Everything that the weight file holds, as ``write_weights`` takes it.

    One layer is in memory at a time. Of a calibration text, rounding makes the most; without one,
    weights are rounded to the nearest, and caches get the scales of random weights.

    Args:
        config: the model's numbers.
        precision: for the CPU, with rounded weights or a rounded cache.
        parameters: reads them in float32, in the decoder's order.
        tables: of RoPE.
        windows: token ids [W, S] of the calibration text; None for random weights.
        kept: the parameters, where they are taken as the source has them and nothing is rounded.

    Raises:
        ExportError: see ``quantise_int8``.
    """
    if windows is not None and (kept is None or precision.cache is not None):
        windows = checked_windows(windows, config)
    maxima: dict[int, CacheMaxima] = {}
    stored = precision.host_weights(config)
    if stored is not None and kept is None:
        watch = Watch(cache=maxima.__setitem__)
        yield from _rounded(config, parameters, stored, windows, watch)
    else:
        if stored is None or kept is None:
            yield from store(precision, parameters())
        else:
            yield from (piece for one in kept for piece in stored.pieces(*one))
        if precision.cache is not None and windows is not None:
            maxima.update(cache_maxima(config, parameters(), windows))
    yield from store(precision, tables)
    if precision.cache is not None:
        usual = np.full(config.num_kv_heads * config.head_dim, RANDOM_MAXIMUM, np.float32)
        for layer in range(config.num_layers):
            yield from cache_scales(config, layer, *maxima.get(layer, (usual, usual)))


def _rounded(
    config: LlamaConfig,
    parameters: Callable[[], Parameters],
    stored: Int8Weights | BlockWeights,
    windows: Windows | None,
    watch: Watch,
) -> Iterator[tuple[str, Piece]]:
    how: How = "nearest" if windows is None else "feedback"
    rounded = (
        quantise_int4(config, parameters(), windows, stored.block, how, watch, stored.eight_bits)
        if isinstance(stored, BlockWeights)
        else quantise_int8(config, parameters(), windows, how, watch)
    )
    yield from (piece for one in rounded for piece in stored.pieces(*one))
