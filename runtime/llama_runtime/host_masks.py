"""Which tokens grammars allow in a step, found out while its graph runs."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from llama_runtime.chunk import Chunk
from llama_runtime.grammar_masks import MaskFiller, Masks, mask_words
from llama_runtime.grammars import Matcher


class HostMasks:
    """Masks in host memory, computed by a thread that sleeps unless a step has grammars.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._num_words = mask_words(vocab_size)
        self._filler = MaskFiller(threads=1)  # the graph has the processors
        self._pool = ThreadPoolExecutor(1, "caravan-masks")  # begins no thread before it is needed

    @contextmanager
    def computing(self, chunks: Seq[Chunk]) -> Iterator[Masks | None]:
        """Compute the masks of a step meanwhile.

        Args:
            chunks: of the step.

        Yields:
            The masks, complete after the block: one for each row that a token is drawn from, where
            rows without a grammar allow everything; None if no row has one.
        """
        rows = grammar_rows(chunks)
        if not rows:
            yield None
            return
        num_rows = sum(chunk.num_sampled for chunk in chunks)
        masks: Masks = np.full((num_rows, self._num_words), -1, np.int32)
        try:
            filled = self._pool.submit(self._filler.fill, rows, masks)
        except RuntimeError:  # the program ends, and only threads that run already go on
            self._filler.fill(rows, masks)
            yield masks
            return
        try:
            yield masks
        finally:
            filled.result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()


def grammar_rows(chunks: Seq[Chunk]) -> list[tuple[int, Matcher, Seq[int]]]:
    """What ``MaskFiller.fill`` needs of the rows of a step that have a grammar."""
    rows, place = [], 0
    for chunk in chunks:
        if chunk.samples and chunk.seq.matcher is not None:
            rows.append((place, chunk.seq.matcher, chunk.draft))
        place += chunk.num_sampled
    return rows
