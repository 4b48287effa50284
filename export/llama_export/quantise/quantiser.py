"""A model's parameters, rounded layer by layer on a calibration text.

Hidden states of all windows go through one layer after the other, as the rounded layers make them,
so each layer makes up for some of what those before it are off by. In memory are one layer, its
largest Gram matrix with two copies, and the hidden states; never the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from llama_decoder.config import LlamaConfig
from llama_decoder.names import EMBEDDING, HEAD, LAST_NORM
from llama_decoder.weights import Array
from llama_export.errors import ExportError
from llama_export.quantise.layer_rounding import LayerRounding, Watch
from llama_export.quantise.layers import (
    Layer,
    Parameters,
    Windows,
    parameter_names,
    take,
    take_layer,
)
from llama_export.quantise.rotation import Rotation
from llama_export.quantise.rounding import (
    Int4Rounding,
    Int8Rounding,
    Product,
    Rounding,
)

How = Literal["feedback", "nearest"]
Rounded = Iterator[tuple[str, Product | Array]]

MIN_TOKENS = 4096  # of a calibration text: fewer than a few a column make the rounding worse


def quantise_int8(
    config: LlamaConfig,
    weights: Parameters,
    windows: Windows | None,
    how: How = "feedback",
    watch: Watch | None = None,
) -> Rounded:
    """Products of the turned model in signed bytes with a scale a row, for activations in bytes.

    Args:
        config: the model's numbers.
        weights: every parameter in float32, in the decoder's order.
        windows: token ids [W, S] of the calibration text; not looked at if rounding to the nearest.
        how: with error feedback, or plainly to the nearest.
        watch: called on the way.

    Yields:
        Parameters in the decoder's order: norms in float32, which are 1, all others as
        ``Int8Product``; and behind the last norm, where the head is the embedding, ``HEAD_TURN``.

    Raises:
        ExportError: a parameter isn't the expected one or not finite, or the text is too short.
    """
    rounding = Int8Rounding(Rotation(config))
    return _quantise(config, weights, windows, how, rounding, watch or Watch())


def quantise_int4(
    config: LlamaConfig,
    weights: Parameters,
    windows: Windows | None,
    block: int = 32,
    how: How = "feedback",
    watch: Watch | None = None,
    eight_bits: frozenset[str] = frozenset(),
) -> Rounded:
    """Products in blocks of 4 bits, embedding and head in blocks of 8; see ``quantise_int8``.

    Args:
        config: as there.
        weights: as there.
        windows: as there.
        block: columns that share a scale and a zero point.
        how: as there.
        watch: as there.
        eight_bits: parameters that have 8 bits, beside embedding and head.

    Yields:
        Parameters in the decoder's order: norms in float32, all others as ``BlockProduct``.

    Raises:
        ExportError: as there.
    """
    return _quantise(
        config, weights, windows, how, Int4Rounding(block, eight_bits), watch or Watch()
    )


def checked_windows(windows: Windows | None, config: LlamaConfig) -> Windows:
    """The windows, if they can serve as a calibration text.

    Raises:
        ExportError: it is too short, or a token isn't the model's.
    """
    if windows is None:
        raise ExportError("rounding with error feedback needs a calibration text: give its windows")
    if windows.size < MIN_TOKENS:
        raise ExportError(
            f"the calibration text has {windows.size:,} tokens in whole windows, and rounding "
            f"needs {MIN_TOKENS:,}: give a longer text"
        )
    if windows.min() < 0 or windows.max() >= config.vocab_size:
        raise ExportError(
            f"the calibration text has token ids from {windows.min()} to {windows.max()}, and the "
            f"model knows 0 to {config.vocab_size - 1}: encode it with the model's own tokenizer"
        )
    return windows


def _quantise(
    config: LlamaConfig,
    weights: Parameters,
    windows: Windows | None,
    how: How,
    rounding: Rounding,
    watch: Watch,
) -> Rounded:
    windows = checked_windows(windows, config) if how == "feedback" else None
    table = rounding.table(take(weights, EMBEDDING))
    layers = None
    if windows is not None:
        layers = LayerRounding(config, rounding, table, windows, watch)
    yield EMBEDDING, table
    del table
    for index in range(config.num_layers):
        layer = take_layer(weights, index)
        yield from _nearest(layer, rounding) if layers is None else layers.rounded(layer)
        watch.progress(index + 1, config.num_layers)
        del layer
    weight = take(weights, LAST_NORM)
    yield from rounding.last_norm(weight, config.tie_embeddings)
    if not config.tie_embeddings:
        yield HEAD, rounding.table(take(weights, HEAD), weight)


def _nearest(layer: Layer, rounding: Rounding) -> Rounded:
    rounding.prepare(layer)
    for field, name in parameter_names(layer.index).items():
        value = getattr(layer, field).numpy()
        yield name, value if value.ndim == 1 else rounding.nearest(name, value)
