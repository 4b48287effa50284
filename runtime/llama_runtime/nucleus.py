"""Draw from a row whose kept tokens may be many, without sorting it.

Each filter keeps the likeliest tokens down to some point, so a draw needs two points of the sorted
row only: where the last filter ends, and where the number falls. Both are found by putting tokens
into bins by their logits and sorting one bin. The result is that of ``sampling.draw``.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from llama_runtime.params import SamplingParams
from llama_runtime.sampling import Logits, weigh

NUM_BINS = 8192
# A draw stays below the end of what is kept: it was added up in another order than the borders.
BELOW_ONE = 1 - 2.0**-40
DEPTH = 64.0  # natural logarithms below the likeliest: what lies deeper shares a bin


def draw_unsorted(logits: Logits, params: SamplingParams, number: float) -> int:
    """The token at ``number`` of the distribution that the filters leave of a row.

    Args:
        logits: [V], with a finite maximum.
        params: with a filter on.
        number: in [0, 1).
    """
    row = _Binned(logits, params.temperature)
    whole = row.borders[-1]
    if 0 < params.top_k < logits.size:
        place = logits.size - params.top_k
        whole = row.weights[logits >= np.partition(logits, place)[place]].sum()
    kept = whole
    if params.top_p < 1:
        kept = min(kept, row.crossing(params.top_p * whole, "left")[1])
    if params.min_p > 0:
        least = params.min_p * row.weights.max()
        kept = min(kept, row.weights[row.weights >= least].sum())
    return row.crossing(min(number, BELOW_ONE) * kept, "right")[0]


class _Binned:
    """Tokens in bins, likeliest first: all of one bin come before all of the next."""

    def __init__(self, logits: Logits, temperature: float) -> None:
        self._logits = logits
        self.weights = weigh(logits, temperature)
        with np.errstate(over="ignore"):  # to infinity, which is deep enough
            depth = np.minimum(logits.max() - logits, np.float32(DEPTH * temperature))
        # A product and a cast keep the order, so equal logits share a bin.
        scale = np.float32(NUM_BINS - 1) / max(depth.max(), np.float32(1e-30))
        self._bins = (depth * scale).astype(np.int32)
        self._mass = np.bincount(self._bins, self.weights)
        self.borders = self._mass.cumsum()

    def crossing(self, target: float, side: Literal["left", "right"]) -> tuple[int, float]:
        """The token with which the sum of the sorted weights passes a target, and that sum."""
        place = min(int(np.searchsorted(self.borders, target, side)), len(self.borders) - 1)
        tokens = np.flatnonzero(self._bins == place)
        tokens = tokens[np.argsort(-self._logits[tokens], kind="stable")]
        tokens = tokens[: max(1, np.count_nonzero(self.weights[tokens]))]
        sums = self.borders[place] - self._mass[place] + self.weights[tokens].cumsum()
        i = min(int(np.searchsorted(sums, target, side)), len(tokens) - 1)
        return int(tokens[i]), float(sums[i])
