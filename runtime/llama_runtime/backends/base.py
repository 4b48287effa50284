"""What the engine asks of the thing that runs the graph.

The engine launches steps and takes their outcome from a ``Runner``. One that overlaps returns from
``launch`` before the step has run, so the next one is planned meanwhile. A ``Backend`` is less: it
gives logits to ``runner.HostRunner``, which samples them in this process.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from llama_runtime.chunk import Chunk
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.step_batch import Step


class Outcome(NamedTuple):
    """What a step came to.

    Attributes:
        token_ids: ``Chunk.num_sampled`` of each chunk, in order; ``NOT_FINITE`` where the logits
            allow none.
        logprobs: of the same, None where they aren't asked for.
        prompt_logprobs: for each chunk, those of the prompt's tokens that follow its rows; empty
            where none are asked for.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]
    prompt_logprobs: list[list[TokenLogprob | None]]


class Launched(Protocol):
    """A step on its way."""

    @property
    def ready(self) -> bool:
        """Whether ``result`` would not wait."""

    def result(self) -> Outcome:
        """Wait for the step.

        Raises:
            BackendError: it failed, and nothing that ran with or after it can be trusted.
        """


class Runner(Protocol):
    """Runs steps over a cache that it owns. Used from one thread at a time."""

    @property
    def overlaps(self) -> bool:
        """Whether a step may be launched before the last one's outcome is known."""

    @property
    def verifies(self) -> bool:
        """Whether it takes chunks with guesses."""

    def launch(self, chunks: Seq[Chunk]) -> Launched:
        """Begin a step; those of one ``Sequence.kind`` lie together.

        Raises:
            BackendError: it can't run; the cache holds what it held, but for cells of the chunks.
        """

    def clean(self, seq: Sequence) -> None:
        """Zero what a sequence wrote, before it changes hands after a fault.

        What isn't a number stays none when it is multiplied by 0, so attention must not meet it.
        """

    def close(self) -> None:
        """Give back what it holds; it can't run afterwards."""


class Backend(Protocol):
    """Runs steps over a cache that it owns. Used from one thread at a time."""

    @property
    def row_multiple(self) -> int:
        """N and R must be multiples of it, so that no row's bits depend on how many there are."""

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """Run one forward and write the new tokens into the cache.

        Returns:
            Logits [R, V], valid until the next call.

        Raises:
            BackendError: the step failed, and the cache can't be trusted any more.
        """

    def clean(self, slot: int, num_tokens: int) -> None:
        """Zero the first tokens of a slot, before it changes hands after a fault.

        What isn't a number stays none when it is multiplied by 0, so attention must not meet it.
        """

    def save_block(self, slot: int, start: int, block: int) -> None:
        """Copy ``CHUNK_MULTIPLE`` tokens of a slot, from ``start`` on, into a block outside it."""

    def load_block(self, slot: int, start: int, block: int) -> None:
        """Copy a block to where its tokens belong in a slot."""

    def close(self) -> None:
        """Give back what the backend holds; it can't run afterwards."""
