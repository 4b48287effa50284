"""Where values lie along an axis."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Protocol

from llama_runtime.pages.page_text import nice_step, number, short

_TICKS = 5


class Scale(Protocol):
    """An axis from 0, its beginning, to 1, its end."""

    def at(self, value: float) -> float:
        """Where a value lies."""

    def ticks(self) -> Seq[tuple[float, str]]:
        """Places of ticks, and their labels."""


@dataclass(frozen=True, slots=True)
class Linear:
    """From 0 to a round number.

    Attributes:
        top: the end.
        step: between ticks.
    """

    top: float
    step: float

    @classmethod
    def to(cls, most: float) -> Linear:
        """The axis for values from 0 up to one."""
        most = most if most > 1e-300 else 1.0
        step = nice_step(most, _TICKS)
        return cls(max(1, ceil(round(most / step, 9))) * step, step)

    def at(self, value: float) -> float:
        """See ``Scale.at``."""
        return value / self.top

    def ticks(self) -> list[tuple[float, str]]:
        """See ``Scale.ticks``."""
        values = [i * self.step for i in range(round(self.top / self.step) + 1)]
        return [(self.at(value), short(round(value, 9))) for value in values]


@dataclass(frozen=True, slots=True)
class Logarithmic:
    """From one power of ten to another, or between 1, 2 and 5 times such where that is close.

    Attributes:
        low: the beginning, above 0.
        high: the end, above it.
    """

    low: float
    high: float

    @classmethod
    def around(cls, values: Seq[float]) -> Logarithmic:
        """The axis for values above 0."""
        found = [value for value in values if value > 0] or [1.0]
        low, high = _rounded(min(found), up=False), _rounded(max(found), up=True)
        return cls(low, high if high > low else 10 * low)

    def at(self, value: float) -> float:
        """See ``Scale.at``."""
        return (log10(max(value, self.low)) - log10(self.low)) / (
            log10(self.high) - log10(self.low)
        )

    def ticks(self) -> list[tuple[float, str]]:
        """See ``Scale.ticks``."""
        decades = log10(self.high / self.low)
        steps = (1, 2, 5) if decades <= 3 else (1,)
        found = []
        for power in range(floor(log10(self.low)) - 1, ceil(log10(self.high)) + 1):
            for step in steps:
                value = step * 10.0**power
                if self.low * 0.999 <= value <= self.high * 1.001:
                    found.append((self.at(value), number(round(value, 9))))
        return found


def _rounded(value: float, *, up: bool) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    tens = 10.0 ** floor(log10(value))
    steps = [step * tens for step in (1, 2, 5, 10)]
    if up:
        return next(step for step in steps if step >= value * 0.999999)
    return next(step for step in reversed(steps) if step <= value * 1.000001)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes that were measured, each twice the one before as far apart as any such pair.

    Attributes:
        sizes: rising, from 1 on.
    """

    sizes: tuple[int, ...]

    def at(self, value: float) -> float:
        """See ``Scale.at``."""
        low, high = log10(self.sizes[0]), log10(self.sizes[-1])
        return (log10(value) - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """See ``Scale.ticks``."""
        return [(self.at(size), str(size)) for size in self.sizes]
