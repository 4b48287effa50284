"""What passes for a graph that computes what the decoder does, and what doesn't."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llama_export.errors import ExportError
from llama_export.verify import ComparedBackend, Verification
from llama_runtime.chunk import Chunk
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.step_batch import Step, StepBatch

GOOD = Verification(
    rows=50,
    max_logit_difference=2e-5,
    logit_tolerance=1e-3,
    greedy_agreement=1.0,
    near_ties=0,
)
DECODER = np.array([[0, 1, 3], [2, 2.0005, 0]], np.float32)


def test_a_graph_as_exact_as_it_may_be_passes() -> None:
    for result in (GOOD, replace(GOOD, max_logit_difference=1e-3)):
        assert result.passed
        result.require_passed()
    assert replace(GOOD, greedy_agreement=0.98, near_ties=1).passed


@pytest.mark.parametrize(
    "change",
    [
        {"max_logit_difference": 1.1e-3},
        {"max_logit_difference": float("inf")},
        {"greedy_agreement": 0.98},
        {"greedy_agreement": 0.96, "near_ties": 1},
    ],
)
def test_a_graph_that_is_off_in_one_way_does_not(change: dict[str, Any]) -> None:
    result = replace(GOOD, **change)
    assert not result.passed
    with pytest.raises(ExportError, match="does not compute what the model does"):
        result.require_passed()


class Stub:
    """A backend and a decoder whose logits are given."""

    row_multiple = 4

    def __init__(self, logits: npt.NDArray[np.float32]) -> None:
        self._logits = logits

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        padding = np.full((len(step.logits_rows) - len(self._logits), 3), 1e9, np.float32)
        return np.concatenate([self._logits, padding])

    def clean(self, slot: int, num_tokens: int) -> None: ...

    def save_block(self, slot: int, start: int, block: int) -> None: ...

    def load_block(self, slot: int, start: int, block: int) -> None: ...

    def close(self) -> None: ...

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, Any]:
        return torch.from_numpy(self._logits), inputs[-1]

    def empty_cache(self, *_: int) -> list[Any]:
        return []


def compared(graph: npt.NDArray[np.float32]) -> Verification:
    """The result of one step whose logits are ``graph``, and ``DECODER`` in the decoder."""
    decoder: Any = Stub(DECODER)
    backend = ComparedBackend(Stub(graph), decoder, num_slots=2, capacity=35)
    params = SamplingParams()
    detokenizer: Any = None
    seqs = [Sequence(slot, [5], 1, params, 0, detokenizer, slot=slot) for slot in range(2)]
    backend.run(StepBatch(2, 33).build([Chunk(seq, 1) for seq in seqs]))
    return backend.result()


def test_the_largest_difference_of_any_logit_counts() -> None:
    assert compared(DECODER).max_logit_difference == 0
    graph = DECODER + np.array([[0, 0, 0], [-0.25, 0, 0]], np.float32)
    assert compared(graph).max_logit_difference == 0.25


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_logit_that_is_no_number_is_an_infinite_difference(value: float) -> None:
    graph = DECODER.copy()
    graph[1, 2] = value
    assert compared(graph).max_logit_difference == np.inf
    assert not compared(graph).passed


def test_another_likeliest_token_is_forgiven_only_where_the_decoder_hardly_decides() -> None:
    near = compared(DECODER + np.array([[0, 0, 0], [8e-4, 0, 0]], np.float32))
    assert (near.greedy_agreement, near.near_ties, near.passed) == (0.5, 1, True)
    far = compared(DECODER + np.array([[0, 5, 0], [0, 0, 0]], np.float32))
    assert (far.greedy_agreement, far.near_ties, far.passed) == (0.5, 0, False)
