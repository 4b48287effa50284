"""How many tokens requests have: a number, or a range that each request draws from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np  # which would make `llama-run --help` slow

LONGEST = 10**6


@dataclass(frozen=True, slots=True)
class Lengths:
    """Numbers of tokens, evenly likely.

    Attributes:
        low: the least, 1 at least.
        high: the most, ``low`` at least.
    """

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From ``128`` or ``16:256``.

        Raises:
            ValueError: it is neither, or a number doesn't lie in 1 to a million.
        """
        first, colon, last = text.strip().partition(":")
        low = _number(first)
        high = _number(last) if colon else low
        if not 1 <= low <= high <= LONGEST:
            raise ValueError(f"{text!r:.80} doesn't rise from 1 on, to {LONGEST:,} at most")
        return cls(low, high)

    def draw(self, numbers: np.random.Generator) -> int:
        """One of them."""
        return int(numbers.integers(self.low, self.high + 1))

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"{text!r:.80} is no whole number")
    return int(text)
