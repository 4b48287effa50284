"""Does the exported graph compute what the decoder computes?

The real engine runs a ragged job on the bundle's graph: prompts of one token and of several
chunks, more sequences than slots, decode beside prompts, idle slots at the end. Each step runs in
the eager decoder too, over the same arrays and a cache of its own, and the logits are compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf, isfinite

import numpy as np
import numpy.typing as npt
import torch

from llama_decoder.decoder import LlamaDecoder
from llama_export.errors import ExportError
from llama_export.stages import Advance
from llama_runtime.backends.base import Backend
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.bundle import Bundle
from llama_runtime.contract import SLOTS, cache_capacity
from llama_runtime.machine import default_threads
from llama_runtime.params import SamplingParams
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from llama_runtime.tokenizer import Tokenizer

LOGIT_TOLERANCE = 1e-3  # float32 against float32: what is left is the order of sums
NEAR_TIE = 1e-3  # two logits this close may change places

PROMPT_LENGTHS = (1, 2, 33, 34, 97, 7, 65, 3)
COMPLETION_LENGTHS = (12, 3, 8, 5, 6, 10, 2, 9)
NUM_SLOTS = 3
PROMPT_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Verification:
    """How far the graph is from the decoder.

    Attributes:
        rows: rows of logits compared.
        max_logit_difference: the largest difference of two logits.
        logit_tolerance: the largest one that passes.
        greedy_agreement: share of the rows with the same likeliest token.
        near_ties: rows that differ there because the decoder's two best logits are closer than
            0.001, which is no disagreement.
    """

    rows: int
    max_logit_difference: float
    logit_tolerance: float
    greedy_agreement: float
    near_ties: int

    @property
    def passed(self) -> bool:
        """Whether the graph may be used."""
        agreeing = round(self.greedy_agreement * self.rows) + self.near_ties
        return self.max_logit_difference <= self.logit_tolerance and agreeing == self.rows

    def require_passed(self) -> None:
        """Raise an ``ExportError`` that says how far off the graph is, unless it passed."""
        if not self.passed:
            raise ExportError(
                f"the graph does not compute what the model does: logits differ by up to "
                f"{self.max_logit_difference:.2g} (limit {self.logit_tolerance:g}), and "
                f"{self.greedy_agreement:.1%} of the likeliest tokens agree"
            )

    def as_dict(self) -> dict[str, object]:
        """As the manifest records it."""
        return asdict(self)

    def summary(self) -> str:
        """The figures in one sentence."""
        return (
            f"{self.rows} rows of logits differ by at most {self.max_logit_difference:.2g} "
            f"(limit {self.logit_tolerance:g}); {self.greedy_agreement:.1%} of the likeliest "
            f"tokens agree, {self.near_ties} more are near ties"
        )


def verify(
    bundle: Bundle, decoder: LlamaDecoder, progress: Advance = lambda _: None
) -> Verification:
    """Compare a bundle's graph with the eager decoder.

    Args:
        bundle: with a graph in the ``slots`` dialect.
        decoder: the source model, built with ``eager_attention``.
        progress: called with the number of tokens generated so far, of ``num_compared_tokens()``.

    Raises:
        BackendError: the graph doesn't load or run.
    """
    geometry = bundle.manifest.geometry
    longest = min(geometry.max_positions, max(PROMPT_LENGTHS) + max(COMPLETION_LENGTHS))
    capacity = cache_capacity(longest, PROMPT_CHUNK)
    session = open_session(bundle.graph_path(SLOTS.name), default_threads())
    graph = OrtCpu(session, geometry, num_slots=NUM_SLOTS, capacity=capacity)
    compared = ComparedBackend(graph, decoder, NUM_SLOTS, capacity)
    engine = slots_engine(
        compared,
        Tokenizer(bundle.tokenizer_path).byte_table,
        eos_token_ids=(),
        vocab_size=geometry.vocab_size,
        max_batch=NUM_SLOTS,
        max_len=longest,
        prompt_budget=2 * PROMPT_CHUNK,
        max_chunk=PROMPT_CHUNK,
    )
    tokens = np.random.default_rng(0)
    for length, count in zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True):
        fitting = min(length, longest - count)
        prompt = tokens.integers(0, geometry.vocab_size, fitting).tolist()
        engine.add(prompt, SamplingParams(max_tokens=count))
    done = 0
    while engine.has_work:
        done += sum(event.token_id is not None for event in engine.step())
        progress(done)
    if engine.failure is not None:
        raise engine.failure
    engine.close()
    return compared.result()


def num_compared_tokens() -> int:
    """Tokens that ``verify`` generates, for progress."""
    return sum(COMPLETION_LENGTHS)


class ComparedBackend:
    """A backend that runs each step in the eager decoder too and keeps the differences."""

    def __init__(
        self, backend: Backend, decoder: LlamaDecoder, num_slots: int, capacity: int
    ) -> None:
        self.row_multiple = backend.row_multiple
        self._backend = backend
        self._decoder = decoder
        self._cache = decoder.empty_cache(num_slots, capacity)
        self._rows = self._agreeing = self._near_ties = 0
        self._difference = 0.0

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``; the logits are those of the graph."""
        logits = self._backend.run(step)
        inputs = [torch.from_numpy(getattr(step, spec.name)) for spec in SLOTS.inputs]
        slots = slice(step.first_slot, step.first_slot + len(step.query_seqlens))
        window = [(key[slots], value[slots]) for key, value in self._cache]
        expected, after = self._decoder(*inputs[:2], inputs[2:], window)
        for (key, value), (new_key, new_value) in zip(self._cache, after, strict=True):
            key[slots], value[slots] = new_key, new_value
        if step.num_logits:
            self._compare(logits[: step.num_logits], expected[: step.num_logits].numpy())
        return logits

    def clean(self, slot: int, num_tokens: int) -> None:
        """See ``Backend.clean``; the decoder's cache is only read up to what was written."""
        self._backend.clean(slot, num_tokens)

    def save_block(self, slot: int, start: int, block: int) -> None:
        """See ``Backend.save_block``."""
        self._backend.save_block(slot, start, block)

    def load_block(self, slot: int, start: int, block: int) -> None:
        """See ``Backend.load_block``."""
        self._backend.load_block(slot, start, block)

    def close(self) -> None:
        """See ``Backend.close``."""
        self._backend.close()

    def _compare(self, logits: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
        self._rows += len(logits)
        with np.errstate(invalid="ignore"):
            difference = float(np.abs(logits - expected).max())
        # A NaN is larger than nothing: max() would lose it, and a broken graph would pass.
        self._difference = max(self._difference, difference if isfinite(difference) else inf)
        best = np.partition(expected, -2, axis=1)[:, -2:]
        same = logits.argmax(axis=1) == expected.argmax(axis=1)
        self._agreeing += int(same.sum())
        self._near_ties += int((~same & (best[:, 1] - best[:, 0] < NEAR_TIE)).sum())

    def result(self) -> Verification:
        """What the comparison of all steps so far came to."""
        return Verification(
            rows=self._rows,
            max_logit_difference=self._difference,
            logit_tolerance=LOGIT_TOLERANCE,
            greedy_agreement=self._agreeing / self._rows,
            near_ties=self._near_ties,
        )
