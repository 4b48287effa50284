"""The one-row probe: to which multiple rows must be padded on this machine.

Kernels may give a single row, or an odd last one, other bits than it has among many, and which of
them do so depends on the weights' precision and on the processor. So the graph itself is asked at
load: a few rows must be the same rows of many, bit for bit. Where a row may run alone it does,
which makes a single stream faster than four rows would.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from llama_runtime.contract import MAX_ROW_MULTIPLE
from llama_runtime.step_batch import Step

logger = logging.getLogger(__name__)

PROBE_SLOTS = 16  # more rows than the widest kernel of ONNX Runtime takes at once, which is 12
PROBE_CAPACITY = 2  # the operator takes an idle slot for one that holds a token
# Numbers of rows to try for each multiple: one group alone, some, and one more than a kernel takes.
_COUNTS = {1: (1, 3, 13), 2: (2, 6, 14), MAX_ROW_MULTIPLE: (4, 12)}


def least_row_multiple(run: Callable[[Step], npt.NDArray[np.float32]], vocab_size: int) -> int:
    """The least multiple of rows at which a row's bits don't depend on how many there are.

    Args:
        run: one forward with ``PROBE_SLOTS`` slots of ``PROBE_CAPACITY`` tokens.
        vocab_size: V.

    Returns:
        1, 2 or 4; also 4, with a warning, where none of them will do.
    """
    many = run(first_tokens(PROBE_SLOTS, vocab_size))[:PROBE_SLOTS].copy()
    for multiple, counts in _COUNTS.items():
        if all(_same_bits(run(first_tokens(n, vocab_size))[:n], many[:n]) for n in counts):
            return multiple
    logger.warning(
        "on this processor the bits of a row depend on how many rows run beside it: completions "
        "may differ in near ties between a run alone and one in company"
    )
    return MAX_ROW_MULTIPLE


def first_tokens(num_rows: int, vocab_size: int) -> Step:
    """A step of the first token of as many sequences, each of another token, with all logits."""
    rows = np.arange(num_rows, dtype=np.int64)
    unpack = np.zeros((PROBE_SLOTS, 1), np.int64)
    unpack[:num_rows, 0] = rows
    return Step(
        input_ids=rows * vocab_size // PROBE_SLOTS,
        logits_rows=rows,
        unpack=unpack,
        pack=rows,
        seqlens_k=np.zeros(PROBE_SLOTS, np.int32),
        query_seqlens=(np.arange(PROBE_SLOTS) < num_rows).astype(np.int32),
        total_sequence_length=np.array(1, np.int32),
        first_slot=0,
        num_logits=num_rows,
        num_scored=0,
        chunks=(),
    )


def _same_bits(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> bool:
    return a.tobytes() == b.tobytes()
