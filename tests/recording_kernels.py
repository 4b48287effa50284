"""The kernels of ``kernels/sampler.cu`` in numpy, by the runtime's own reference.

They take the same arguments, after a way to see memory as an array and the number of blocks; logits
are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.cuda_sampler import IN_PROMPT, THREADS
from llama_runtime.backends.fake_paged import _params
from llama_runtime.grammar_masks import forbid, mask_words
from llama_runtime.sampling import NOT_FINITE, Logits, Reference, draw, likeliest, uniform
from llama_runtime.step_arrays import EDITED, GREEDY, MASKED, ROW


class Array(Protocol):
    """Memory as an array; writing to it writes there."""

    def __call__(self, address: int, dtype: npt.DTypeLike, *shape: int) -> npt.NDArray[Any]: ...


def _edited(array: Array, values: Logits, row: np.void, *tables: int) -> None:
    """Bias and penalties, from a slot's tables, written into a row of logits."""
    size, slot = len(values), int(row["slot"])
    values += array(tables[0] + 4 * size * slot, "f4", size)
    counts = array(tables[1] + 2 * size * slot, "u2", size)
    completed = (counts & (IN_PROMPT - 1)).astype(np.float32)
    if row["repetition"] != 1:
        changed = np.where(values < 0, values * row["repetition"], values / row["repetition"])
        np.copyto(values, changed, where=counts > 0)
    values -= row["frequency"] * completed + row["presence"] * (completed > 0)


def _sample(
    array: Array,
    blocks: int,
    logits: int,
    rows: int,
    masks: int,
    bias: int,
    counts: int,
    size: int,
    newest: int,
    tokens: int,
) -> None:
    for i, row in enumerate(array(rows, ROW, blocks)):
        if row["slot"] < 0:
            continue
        values = array(logits + 4 * size * i, "f4", size).copy()
        if row["flags"] & EDITED:
            _edited(array, values, row, bias, counts)
        if row["flags"] & MASKED:
            words = mask_words(size)
            forbid(values, array(masks + 4 * words * i, "i4", words))
        token = int(likeliest(values[None])[0])
        if token != NOT_FINITE and not row["flags"] & GREEDY:
            number = uniform(int(row["seed"]), int(row["sample"]), int(row["index"]))
            token = draw(values, _params(row), number)
        if row["flags"] & EDITED and token != NOT_FINITE:
            array(counts + 2 * (size * int(row["slot"]) + token), "u2", 1)[0] += 1
        array(newest + 4 * int(row["slot"]), "i4", 1)[0] = token
        array(tokens + 4 * i, "i4", 1)[0] = token


def _score(
    array: Array,
    blocks: int,
    logits: int,
    rows: int,
    wanted: int,
    tokens: int,
    size: int,
    num_top: int,
    *to: int,
) -> None:
    for i in range(blocks):
        row = int(array(rows, "i4", blocks)[i])
        token = int(array(wanted, "i4", blocks)[i])
        if token < 0:
            token = max(int(array(tokens + 4 * row, "i4", 1)[0]), 0)
        values = array(logits + 4 * size * row, "f4", 1, size)
        scores = Reference().score(values, np.array([token]))
        array(to[0] + 8 * i, "f8", 1)[:] = scores.logprobs
        begin = i * num_top
        array(to[1] + 4 * begin, "i4", num_top)[:] = scores.top_token_ids[0, :num_top]
        array(to[2] + 8 * begin, "f8", num_top)[:] = scores.top_logprobs[0, :num_top]


def _feed(array: Array, blocks: int, given: int, newest: int, to: int, size: int) -> None:
    size = min(size, blocks * THREADS)  # the others have no thread
    for i, token in enumerate(array(given, "i4", size).tolist()):
        if token < 0:
            token = max(int(array(newest + 4 * (-1 - token), "i4", 1)[0]), 0)
        array(to, "i8", size)[i] = token


def _scatter(item: str) -> Callable[..., None]:
    def scatter(array: Array, blocks: int, table: int, ids: int, values: int, size: int) -> None:
        size = min(size, blocks * THREADS)
        stored = array(values, "i4" if item == "u2" else item, size)
        for token, value in zip(array(ids, "i4", size).tolist(), stored, strict=True):
            place = table + np.dtype(item).itemsize * token
            array(place, item, 1)[0] = value

    return scatter


KERNELS: dict[str, Callable[..., None]] = {
    "sample": _sample,
    "score": _score,
    "feed": _feed,
    "scatter_bias": _scatter("f4"),
    "scatter_counts": _scatter("u2"),
}
