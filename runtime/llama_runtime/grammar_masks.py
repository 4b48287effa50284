"""Which tokens the grammars of a step allow: one bit a token, in some microseconds."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llama_runtime.errors import RequestError
from llama_runtime.grammars import Matcher

if TYPE_CHECKING:
    import llguidance

Masks = npt.NDArray[np.int32]


class MaskFiller:
    """Computes the masks of many matchers side by side.

    Args:
        threads: of the computation.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor: llguidance.LLExecutor | None = None

    def fill(self, rows: Seq[tuple[int, Matcher, Seq[int]]], masks: Masks) -> None:
        """Write which tokens may come next.

        Where a matcher can't compute it within its limits, it is the end; ``Matcher.end`` says so.

        Args:
            rows: the row of a matcher, and guesses at its next tokens; the rows after that one
                take what may follow them, up to the first that isn't allowed.
            masks: [R, ceil(V / 32)], a bit a token, the lowest first; other rows stay as they are.
        """
        import llguidance

        if self._executor is None:
            self._executor = llguidance.LLExecutor(self._threads)
        place = masks.ctypes.data, masks.shape[1] * masks.itemsize, masks.shape[0]
        single = [(matcher.state, row) for row, matcher, draft in rows if not draft]
        # On copies, which a wrong guess may break.
        guessed = [
            (matcher.state.deep_copy(), row, list(draft)) for row, matcher, draft in rows if draft
        ]
        if single:
            self._executor.unsafe_compute_mask_ptr(single, *place)
        if guessed:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(guessed, *place)
        for row, matcher, _ in rows:
            if matcher.state.is_error():
                with suppress(RequestError):  # which its next token says
                    matcher.recover()
                    self._executor.unsafe_compute_mask_ptr([(matcher.state, row)], *place)


def mask_words(vocab_size: int) -> int:
    """The int32 numbers of one mask."""
    return -(-vocab_size // 32)


def forbid(logits: npt.NDArray[np.float32], mask: Masks) -> None:
    """Put tokens out of reach.

    Args:
        logits: [V], written into.
        mask: [ceil(V / 32)].
    """
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little", count=len(logits))
    np.copyto(logits, np.float32(-np.inf), where=allowed == 0)
