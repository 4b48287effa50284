"""Which tokens a sequence holds, and how often, kept up to date for the penalties."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """The distinct tokens of a prompt and its completion; one more costs the same at any length.

    Args:
        prompt: the prompt's tokens.
    """

    __slots__ = ("_completion", "_ids", "_num_in_prompt", "_places")

    def __init__(self, prompt: Iterable[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._num_in_prompt = len(distinct)
        room = max(16, 2 * len(distinct))
        self._ids = np.zeros(room, np.int64)
        self._ids[: len(distinct)] = list(distinct)
        self._completion = np.zeros(room, np.int64)

    def add(self, token_id: int) -> None:
        """Count a token of the completion."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._completion = np.concatenate([self._completion, np.zeros_like(self._completion)])
        self._ids[place] = token_id
        self._completion[place] += 1

    def remove(self, token_id: int) -> None:
        """Take back the last ``add``."""
        place = self._places[token_id]
        self._completion[place] -= 1
        if place >= self._num_in_prompt and not self._completion[place]:
            del self._places[token_id]  # the last place, which it had been given

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """The distinct tokens, in order of their first appearance."""
        return self._ids[: len(self._places)]

    @property
    def in_completion(self) -> npt.NDArray[np.int64]:
        """How often each of them is in the completion."""
        return self._completion[: len(self._places)]
