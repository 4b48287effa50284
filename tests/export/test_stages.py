"""What is counted for a progress bar isn't kept for it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np

from llama_export.stages import counted


def test_an_item_is_forgotten_before_the_next_is_made() -> None:
    """``enumerate`` keeps the pair that it gave last: two matrices were in memory at a time."""
    made: list[weakref.ref[np.ndarray]] = []
    told: list[int] = []

    def matrices() -> Iterator[tuple[str, np.ndarray]]:
        for name in "abc":
            assert all(ref() is None for ref in made), f"something is kept while {name} is made"
            matrix = np.zeros((2, 2))
            made.append(weakref.ref(matrix))
            pair = name, matrix
            del matrix
            yield pair
            del pair

    given = counted(matrices(), told.append)
    for name in "abc":
        pair = next(given)
        assert pair[0] == name
        del pair
    assert next(given, None) is None
    assert told == [1, 2, 3]
