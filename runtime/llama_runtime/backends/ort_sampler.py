"""The compiled sampler on the CPU, fed with the decoder's logits where they lie."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np

from llama_runtime.backends.ort_cpu import open_session
from llama_runtime.backends.ort_library import check_signature
from llama_runtime.contract import (
    MAX_TOP_LOGPROBS,
    SAMPLER_INPUTS,
    SAMPLER_OUTPUTS,
    SAMPLER_ROWS,
)
from llama_runtime.nucleus import draw_unsorted
from llama_runtime.params import SamplingParams
from llama_runtime.sampling import (
    NOT_FINITE,
    Int64s,
    Logits,
    Scores,
    likeliest,
    sampling_kind,
)

CANDIDATES = 256  # of a filter
MAX_INVERSE_TEMPERATURE = np.finfo(np.float32).max  # times a distance of 0 it must stay 0


class OrtSampler:
    """See ``Kernels``; the graph is that of ``llama_export.sampler``.

    Args:
        graph: ``sampler.onnx`` of a bundle.
        vocab_size: V.
        threads: threads of the kernels.

    Raises:
        DependencyError: onnxruntime is missing.
        BackendError: the graph can't be loaded, or isn't a sampler of this vocabulary.
    """

    def __init__(self, graph: Path, vocab_size: int, threads: int) -> None:
        self._session = open_session(graph, threads)
        sizes = {"V": vocab_size, "1": 1, "T": min(MAX_TOP_LOGPROBS, vocab_size)}
        check_signature(self._session, SAMPLER_INPUTS, SAMPLER_OUTPUTS, sizes)
        self._size = vocab_size
        self._none = np.zeros((0, vocab_size), np.float32)
        self._candidates = np.array([min(CANDIDATES, vocab_size)])

    def choose(self, logits: Logits, params: Seq[SamplingParams], numbers: Seq[float]) -> Int64s:
        """See ``Reference.choose``."""
        tokens = np.zeros(len(params), np.int64)
        for start in range(0, len(params), SAMPLER_ROWS):
            part = slice(start, start + SAMPLER_ROWS)
            tokens[part] = self._choose(logits[part], params[part], numbers[part])
        return tokens

    def score(self, logits: Logits, token_ids: Int64s) -> Scores:
        """See ``Reference.score``."""
        parts = []
        for start in range(0, len(token_ids), SAMPLER_ROWS):
            part = slice(start, start + SAMPLER_ROWS)
            rows = {"scored_logits": logits[part], "scored_tokens": token_ids[part, None]}
            found = self._run(rows)
            names = ("scored_logprobs", "top_tokens", "top_logprobs")
            parts.append([found[name] for name in names])
        logprobs, top, top_logprobs = map(np.concatenate, zip(*parts, strict=True))
        return Scores(logprobs[:, 0], top, top_logprobs)

    def _choose(self, logits: Logits, params: Seq[SamplingParams], numbers: Seq[float]) -> Int64s:
        kinds = [sampling_kind(of_row) for of_row in params]
        if kinds != sorted(kinds):
            raise ValueError("rows of one kind must lie together")
        greedy, whole = kinds.count(0), kinds.count(0) + kinds.count(1)
        drawn, filtered = slice(greedy, whole), slice(whole, None)
        return np.concatenate(
            [
                likeliest(logits[:greedy]),  # at once, and faster than any operator
                self._whole(logits[drawn], params[drawn], numbers[drawn]),
                self._filtered(logits[filtered], params[filtered], numbers[filtered]),
            ]
        )

    def _whole(self, logits: Logits, params: Seq[SamplingParams], numbers: Seq[float]) -> Int64s:
        if not params:
            return np.zeros(0, np.int64)
        found = self._run(_drawn("whole", logits, params, numbers))
        tokens: Int64s = found["whole_tokens"][:, 0]
        tokens[np.isnan(found["whole_totals"][:, 0])] = NOT_FINITE
        return tokens

    def _filtered(self, logits: Logits, params: Seq[SamplingParams], numbers: Seq[float]) -> Int64s:
        if not params:
            return np.zeros(0, np.int64)
        found = self._run(
            _drawn("filtered", logits, params, numbers) | _filters(params, self._size)
        )
        tokens: Int64s = found["filtered_tokens"][:, 0]
        finite = ~np.isnan(found["filtered_totals"][:, 0])
        tokens[~finite] = NOT_FINITE
        for i in np.flatnonzero(finite & ~found["filtered_covered"][:, 0]).tolist():
            tokens[i] = draw_unsorted(logits[i], params[i], numbers[i])
        return tokens

    def _run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """One run; inputs that aren't given have no rows."""
        feeds: dict[str, Any] = {
            spec.name: np.zeros((0, 1), spec.dtype) if spec.axes[-1] == "1" else self._none
            for spec in SAMPLER_INPUTS
        }
        feeds |= {"candidates": self._candidates}
        names = [spec.name for spec in SAMPLER_OUTPUTS]
        return dict(zip(names, self._session.run(names, feeds | inputs), strict=True))


def _drawn(
    kind: str, logits: Logits, params: Seq[SamplingParams], numbers: Seq[float]
) -> dict[str, Any]:
    with np.errstate(over="ignore", divide="ignore"):
        inverse = 1 / np.array([of_row.temperature for of_row in params], np.float64)
    inverse = np.minimum(inverse, MAX_INVERSE_TEMPERATURE).astype(np.float32)
    return {
        f"{kind}_logits": logits,
        f"{kind}_inverse_temperatures": inverse[:, None],
        f"{kind}_numbers": np.array(numbers, np.float64)[:, None],
    }


def _filters(params: Seq[SamplingParams], vocab_size: int) -> dict[str, Any]:
    top_k = [min(of_row.top_k or vocab_size, vocab_size) for of_row in params]
    return {
        "top_k": np.array(top_k, np.int64)[:, None],
        "top_p": np.array([of_row.top_p for of_row in params], np.float64)[:, None],
        "min_p": np.array([of_row.min_p for of_row in params], np.float64)[:, None],
    }
