"""Scale for the head, whose inputs have outliers too, and whose matrix may be the embedding.

The last norm can be divided by scales that the head is multiplied with, as in every layer. Where
the head is the embedding, what is looked up in it must be divided by them: a product of [N, E] in
the graph, against an error of the logits that is three times as large without (SmolLM2). The scales
must be known before the embedding is written, which is first: hence a pass of its own.
"""

from __future__ import annotations

import numpy as np
import torch

from llama_decoder import names
from llama_decoder.config import LlamaConfig
from llama_decoder.rope import rope_tables
from llama_decoder.weights import Array
from llama_export.quantise.layers import Parameters, Windows, normed, pass_layer, take, take_layer
from llama_export.quantise.rounding import Int8Rounding
from llama_export.quantise.smoothing import SAMPLE_ROWS, Inputs, best_scales

_TOKENS = 4096  # that go through the layers
_CHANNELS = 1024  # rows of the head that are kept until its inputs are known


@torch.inference_mode()
def head_scales(config: LlamaConfig, weights: Parameters, windows: Windows) -> Array:
    """The scales [E] with which a head in 8 by 8 bits is off by least.

    Args:
        config: the model's numbers.
        weights: every parameter in float32, in the decoder's order; one layer is in memory at a
            time.
        windows: token ids [W, S] of the calibration text.

    Raises:
        ExportError: a parameter isn't the expected one or not finite.
    """
    windows = windows[:: max(1, windows.size // _TOKENS)]
    (first,), (last,), (head,) = (
        [row.name for row in rows] for rows in (names.FIRST, names.LAST, names.UNTIED)
    )
    matrix = take(weights, first)
    hidden = torch.from_numpy(matrix[windows])  # [W, S, E]
    kept = _some_rows(matrix)
    del matrix
    tables = rope_tables(config, windows.shape[1])
    for index in range(config.num_layers):
        pass_layer(config, take_layer(weights, index), hidden, tables)
    rows = normed(hidden, torch.from_numpy(take(weights, last)), config).flatten(0, 1)
    if not config.tie_embeddings:
        kept = _some_rows(take(weights, head))
    rounding = Int8Rounding()
    inputs = Inputs(rows.abs().amax(0), rows[:: max(1, len(rows) // SAMPLE_ROWS)])
    scales: Array = best_scales(
        inputs, [torch.from_numpy(kept)], rounding.activations, rounding.rough
    ).numpy()
    return scales


def _some_rows(matrix: Array) -> Array:
    return np.array(matrix[:: max(1, len(matrix) // _CHANNELS)])
