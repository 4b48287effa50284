"""Random rows of logits with parameters and numbers, and which tokens may be drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from llama_export.sampler import save_sampler
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.params import SamplingParams
from llama_runtime.sampling import NOT_FINITE, Kernels, Reference, sampling_kind

Row = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Mix = tuple[str, ...] | None  # the filters that are on; None is greedy

# What a graph in float32 may be off by, as a share of the whole distribution.
TOLERANCE = 1e-6
JUST_BELOW_1 = 1 - 2.0**-53
TEMPERATURES = (0.05, 0.3, 0.7, 1.0, 1.0, 1.5, 10.0)
EXTREME_TEMPERATURES = (5e-324, 1e-30, 1e-9, 100.0)
FILTERS = ("top_k", "top_p", "min_p")
# Greedy, drawn from the whole vocabulary, and every set of filters.
MIXES: tuple[Mix, ...] = (
    None,
    (),
    *chain.from_iterable(combinations(FILTERS, size) for size in (1, 2, 3)),
)


def _with_one(rng: np.random.Generator, row: Floats, value: float) -> Floats:
    row[rng.integers(row.size)] = value
    return row


def _language(rng: np.random.Generator, row: Floats) -> Floats:
    row[rng.integers(row.size, size=20)] += rng.uniform(4, 14, 20)
    return row


SHAPES: dict[str, Callable[[np.random.Generator, Floats], Floats]] = {
    "normal": lambda _, row: row,
    "sharp": lambda _, row: 12 * row,
    "flat": lambda _, row: 0.02 * row,  # no nucleus of it is among a few hundred tokens
    "language": _language,  # a few tokens far above a bulk, as a model gives
    "whole numbers": lambda _, row: np.round(2 * row),  # many equal ones
    "holes": lambda rng, row: _with_one(rng, np.where(row > 0, row, -np.inf), 1),
    "all equal": lambda rng, row: np.full_like(row, rng.choice([0, -7.5, 1e30])),
    "one hot": lambda rng, row: _with_one(rng, np.zeros_like(row), 60),
    "huge": lambda rng, row: 1e38 * rng.choice([-3, -1, 1, 3], row.size),  # their sum overflows
    "huge and equal": lambda _, row: np.full_like(row, 3e38),
    "tiny": lambda _, row: 1e-30 * row,
    "one left": lambda rng, row: _with_one(rng, np.full_like(row, -np.inf), -3),
}


@dataclass(frozen=True)
class Job:
    """Rows of one call, those of one kind together."""

    logits: npt.NDArray[np.float32]  # [R, V]
    params: list[SamplingParams]
    numbers: list[float]


@dataclass
class Agreement:
    """How a sampler compares with the reference.

    Attributes:
        rows: all of them.
        equal: those with the reference's token.
        near: those whose token lies next to it, no further than ``TOLERANCE`` away.
        wrong: what the others are, a line each.
    """

    rows: int
    equal: int
    near: int
    wrong: list[str]


def random_row(rng: np.random.Generator, vocab_size: int, shape: str) -> Row:
    """Logits [V] of one of ``SHAPES``."""
    row = SHAPES[shape](rng, rng.standard_normal(vocab_size))
    return row.astype(np.float32)


def random_params(rng: np.random.Generator, vocab_size: int, mix: Mix) -> SamplingParams:
    """Parameters of a row of one of ``MIXES``."""
    if mix is None:
        return SamplingParams()
    temperatures = TEMPERATURES if rng.random() < 0.9 else EXTREME_TEMPERATURES
    top_ks = [1, 2, 5, 50, 255, 256, 257, 1000, max(1, vocab_size - 1), vocab_size, vocab_size + 9]
    return SamplingParams(
        temperature=float(rng.choice(temperatures)),
        top_k=int(rng.choice(top_ks)) if "top_k" in mix else 0,
        top_p=float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.95, 0.999])) if "top_p" in mix else 1.0,
        min_p=float(rng.choice([1e-6, 0.001, 0.05, 0.5, 1])) if "min_p" in mix else 0.0,
    )


def job(rng: np.random.Generator, vocab_size: int, kinds: Iterable[tuple[str, Mix]]) -> Job:
    """Rows of these shapes and mixes, in the order that the kernels want."""
    rows = []
    for shape, mix in kinds:
        number = rng.random() if rng.random() < 0.9 else rng.choice([0.0, 5e-324, JUST_BELOW_1])
        row = random_row(rng, vocab_size, shape)
        rows.append((random_params(rng, vocab_size, mix), float(number), row))
    rows.sort(key=lambda row: sampling_kind(row[0]))
    return Job(np.stack([row[2] for row in rows]), [r[0] for r in rows], [r[1] for r in rows])


def every_kind() -> list[tuple[str, Mix]]:
    """Each shape with each mix, once."""
    return list(product(SHAPES, MIXES))


def random_kinds(rng: np.random.Generator, count: int) -> list[tuple[str, Mix]]:
    """So many of them."""
    kinds = every_kind()
    return [kinds[i] for i in rng.integers(len(kinds), size=count)]


@cache
def compiled(vocab_size: int, threads: int = 1) -> OrtSampler:
    """The compiled sampler; its file isn't needed once it is loaded."""
    with TemporaryDirectory() as folder:
        graph = Path(folder, "sampler.onnx")
        save_sampler(vocab_size, graph)
        return OrtSampler(graph, vocab_size, threads)


def compare(kernels: Kernels, job: Job) -> Agreement:
    """A sampler's tokens beside those of the reference."""
    expected = Reference().choose(job.logits, job.params, job.numbers)
    found = kernels.choose(job.logits, job.params, job.numbers)
    result = Agreement(len(found), int((found == expected).sum()), 0, [])
    for i in np.flatnonzero(found != expected).tolist():
        args = job.logits[i], job.params[i], job.numbers[i]
        if is_near(*args, int(found[i])):
            result.near += 1
        else:
            result.wrong.append(
                f"row {i}, {job.params[i]}, number {job.numbers[i]!r}: {found[i]}, {expected[i]}"
            )
    return result


def is_near(logits: Row, params: SamplingParams, number: float, token: int) -> bool:
    """Whether the number is this token's, were borders moved by ``TOLERANCE``."""
    if params.greedy or token == NOT_FINITE or not logits[token] > -np.inf:
        return False
    moved = [params]
    if params.top_p < 1:
        top_ps = [max(5e-324, params.top_p - TOLERANCE), min(1.0, params.top_p + TOLERANCE)]
        moved += [replace(params, top_p=top_p) for top_p in top_ps]
    if 0 < params.min_p < 1:
        factors = (1 - TOLERANCE, 1 + TOLERANCE)
        moved += [replace(params, min_p=params.min_p * factor) for factor in factors]
    for of_row in moved:
        order, ends = distribution(logits, of_row)
        for place in np.flatnonzero(order == token).tolist():
            start, end = ends[place - 1] if place else 0.0, ends[place]
            if start - TOLERANCE <= number <= end + TOLERANCE:
                return True
    return False


def distribution(
    logits: Row, params: SamplingParams
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that are kept, in the order in which they are drawn, and where each one ends."""
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max().astype(np.float64)) / params.temperature)
    order = np.arange(logits.size)
    if params.filtered:
        order = np.argsort(-logits, kind="stable")
        if 0 < params.top_k < logits.size:
            order = order[logits[order] >= logits[order[params.top_k - 1]]]
        shares = weights[order] / weights[order].sum()
        order = order[(shares.cumsum() - shares < params.top_p) | (params.top_p == 1)]
        order = order[weights[order] >= params.min_p * weights.max()]
    ends = weights[order].cumsum()
    return order, ends / ends[-1]
