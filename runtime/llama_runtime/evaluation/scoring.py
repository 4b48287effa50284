"""A bundle's graph run over the windows of its reference, and compared with it place by place.

Windows run one after the other, in chunks as prompts do in production: up to 128 tokens, the last
one as ``contract.last_chunk_start`` says. So the logits are those that the engine would see, bit
for bit, and more windows at once would neither change them nor be faster: 128 rows fill a product.
No more than a chunk's logits are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.bundle import Bundle
from llama_runtime.contract import PROMPT_CHUNK, SLOTS, cache_capacity, last_chunk_start
from llama_runtime.evaluation.partition import Logits, divergences, predictions
from llama_runtime.evaluation.reference import Reference, Window, read_reference
from llama_runtime.evaluation.report import Figures, QualityReport, Scores
from llama_runtime.loading import plan
from llama_runtime.machine import default_threads
from llama_runtime.settings import Settings
from llama_runtime.step_batch import Step, padded

T = TypeVar("T")
Progress = Callable[[int, int], None]  # tokens predicted so far, of so many


class Graph(Protocol):
    """The part of a ``Backend`` that is needed here."""

    row_multiple: int

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""


def evaluate(
    bundle: Bundle,
    *,
    threads: int | None = None,
    limit: int | None = None,
    reference: Reference | None = None,
    progress: Progress = lambda _, __: None,
) -> QualityReport:
    """Measure how far a bundle's predictions are from those of the fp32 source.

    Args:
        bundle: for the CPU, built with a reference.
        threads: of the kernels; None takes the processors this process may use.
        limit: about so many tokens, taken evenly from all kinds; None takes all.
        reference: the source's predictions; None for those that the bundle holds.
        progress: called with the tokens predicted so far, and the number of all.

    Raises:
        BundleError: the bundle isn't for the CPU, or has no usable reference.
        RequestError: ``threads`` is out of range.
        CapacityError: there isn't the memory.
        BackendError: the graph doesn't load or run, or gives logits that are no finite numbers.
    """
    graph = bundle.graph_path(SLOTS.name)  # first, because others have no reference either
    reference = reference or read_reference(bundle)
    chosen = chosen_windows(reference.windows, limit)
    longest = max(len(window.tokens) for window in reference.windows)
    settings = Settings(max_batch=1, max_len=longest, threads=threads, prefix_tokens=0)
    wanted = plan(bundle, settings)
    wanted.check()
    backend = OrtCpu(
        open_session(graph, settings.num_threads(default_threads())),
        bundle.manifest.geometry,
        num_slots=1,
        capacity=cache_capacity(longest, PROMPT_CHUNK),
        cache_dtype=wanted.cache_dtype,
    )
    try:
        scores = score(backend, reference, chosen, progress)
    finally:
        backend.close()
    precision = next(g.precision for g in bundle.manifest.graphs if g.dialect == SLOTS.name)
    return report(precision, reference, scores)


def report(precision: str, reference: Reference, scores: Scores) -> QualityReport:
    """The figures of scores, of each kind of text and of all."""
    kinds = np.array([window.kind for window in reference.windows])[scores.windows]
    figures: Mapping[str, Figures] = {
        kind: Figures.of(scores.where(kinds == kind)) for kind in dict.fromkeys(kinds.tolist())
    }
    return QualityReport(precision, reference.texts_sha256, figures, Figures.of(scores))


def chosen_windows(windows: Sequence[Window], limit: int | None) -> list[int]:
    """Numbers of the windows that about ``limit`` tokens lie in: of each kind an even share.

    They lie evenly over its texts, and there is at least one of each kind.
    """
    if limit is None:
        return list(range(len(windows)))
    share = limit / max(1, sum(window.num_targets for window in windows))
    chosen = []
    for kind in dict.fromkeys(window.kind for window in windows):
        own = [i for i, window in enumerate(windows) if window.kind == kind]
        chosen += evenly(own, max(1, int(share * len(own))))
    return sorted(chosen)


def evenly(items: Sequence[T], count: int) -> list[T]:
    """So many of them, or all if there aren't more, at equal distances."""
    if count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def score(
    backend: Graph,
    reference: Reference,
    chosen: Sequence[int],
    progress: Progress = lambda _, __: None,
) -> Scores:
    """Run windows and compare each place with the reference.

    Args:
        backend: with one slot that the longest window fits into.
        reference: what to compare with.
        chosen: numbers of its windows, at least one.
        progress: called with the tokens predicted so far, and the number of all.

    Raises:
        BackendError: the graph failed, or gave logits that are no finite numbers.
    """
    parts: list[Scores] = []
    total = sum(reference.windows[number].num_targets for number in chosen)
    done = 0
    for number in chosen:
        tokens = reference.windows[number].tokens[:-1]
        for step, start, end in window_steps(tokens, backend.row_multiple):
            logits = backend.run(step)[: end - start]
            parts.append(compared(reference, number, start, logits))
            done += end - start
            progress(done, total)
    return joined(parts)


def compared(reference: Reference, number: int, start: int, logits: Logits) -> Scores:
    """What logits of some places of a window say, beside the reference.

    Args:
        reference: what to compare with.
        number: of the window.
        start: the first of the places, counted from the window's beginning.
        logits: [R, V], of that place and those after it.

    Raises:
        BackendError: a logit is no finite number.
    """
    first = int(reference.starts[number]) + start
    rows = slice(first, first + len(logits))
    targets = np.array(reference.windows[number].tokens[1 + start : 1 + start + len(logits)])
    top_ids = reference.top_ids[rows]
    found = predictions(logits, top_ids, reference.sample_ids[rows], targets)
    return Scores(
        divergences=divergences(reference.kept(rows), found.kept),
        agrees=found.best == top_ids[:, 0],
        nll=-found.targets,
        reference_nll=-reference.targets[rows].astype(np.float64),
        windows=np.full(len(logits), number),
    )


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of several places, one after the other; at least one part."""
    names = Scores.__dataclass_fields__
    return Scores(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def window_steps(tokens: Sequence[int], row_multiple: int) -> Iterator[tuple[Step, int, int]]:
    """The steps that run tokens from an empty slot 0, and which of them each takes.

    Args:
        tokens: ids, at least one.
        row_multiple: see ``Backend``.
    """
    ids = np.array(tokens, np.int64)
    last = last_chunk_start(len(ids))
    bounds = [*range(0, last, PROMPT_CHUNK), last, len(ids)]
    for start, end in pairwise(bounds):
        yield _step(ids[start:end], start, row_multiple), start, end


def _step(ids: npt.NDArray[np.int64], start: int, row_multiple: int) -> Step:
    """A step of one chunk; rows that pad it are row 0 again, and write no cache."""
    count = len(ids)
    columns = np.arange(count)
    filler = np.zeros(padded(count, row_multiple) - count, np.int64)
    rows = np.concatenate([columns, filler])
    return Step(
        input_ids=ids[rows],
        logits_rows=rows,
        unpack=columns.reshape(1, count),
        pack=rows,
        seqlens_k=np.array([start + count - 1], np.int32),
        query_seqlens=np.array([count], np.int32),
        total_sequence_length=np.array(start + count, np.int32),
        first_slot=0,
        num_logits=count,
        num_scored=0,
        chunks=(),
    )
