"""Counts of values in fixed buckets, and what can be said of the values from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from math import ceil
from typing import Any

# Ten to a decade, each about a quarter above the one before (the R10 series of ISO 3, its 6.3
# taken as 6.4, twice 3.2).
_STEPS = ("1", "1.25", "1.6", "2", "2.5", "3.2", "4", "5", "6.4", "8")
TOKEN_EDGES: tuple[int, ...] = tuple(
    sorted({0, 10**7, *(round(float(f"{step}e{tens}")) for tens in range(7) for step in _STEPS)})
)
SECOND_EDGES: tuple[float, ...] = (
    0.0,
    *(float(f"{step}e{tens}") for tens in range(-3, 5) for step in _STEPS),
    1e5,
)
QUANTILES = (50, 90, 99)  # percent


class Histogram:
    """Counts values in fixed buckets; its memory doesn't grow with them.

    Bucket i holds what is at least ``edges[i]`` and below ``edges[i + 1]``; the last one has no
    upper end.

    Args:
        edges: rising, from 0. If they are whole numbers, so are the values.

    Attributes:
        counts: values in each bucket.
        count: values in all.
        total: their sum.
        least: the smallest; None if there is none.
        most: the largest; None if there is none.
    """

    def __init__(self, edges: Seq[float]) -> None:
        self.counts = [0] * len(edges)
        self.count = 0
        self.total: float = 0
        self.least: float | None = None
        self.most: float | None = None
        self._edges = edges
        self._whole = isinstance(edges[0], int)

    def add(self, value: float) -> None:
        """Count a value, which isn't negative."""
        self.counts[bisect_right(self._edges, value) - 1] += 1
        self.count += 1
        self.total += value
        self.least = value if self.least is None else min(self.least, value)
        self.most = value if self.most is None else max(self.most, value)

    @property
    def mean(self) -> float | None:
        """Exact, as the extremes are; None if nothing was counted."""
        return self.total / self.count if self.count else None

    def quantile(self, percent: float) -> float | None:
        """The value that so many of a hundred don't exceed, estimated.

        It lies in the same bucket as the true one, so it is off by at most a quarter, and is
        found there as if the values of a bucket lay evenly.

        Args:
            percent: above 0, up to 100.
        """
        if self.least is None or self.most is None:
            return None
        rank = max(1, ceil(self.count * percent / 100))
        before = bucket = 0
        while before + self.counts[bucket] < rank:
            before += self.counts[bucket]
            bucket += 1
        low = max(self._edges[bucket], self.least)
        high = min(self._upper(bucket), self.most)
        value = low + (high - low) * (rank - before - 0.5) / self.counts[bucket]
        return round(value) if self._whole else value

    def _upper(self, bucket: int) -> float:
        """The largest value that a bucket holds, or where it ends."""
        if bucket + 1 == len(self._edges):
            return float("inf")
        end = self._edges[bucket + 1]
        return end - 1 if self._whole else end

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: figures to read, and the buckets that aren't empty.

        ``histogram`` is a list of [from, below, count]; "below" is None for the last bucket.
        """
        ends = (*self._edges[1:], None)
        return {
            "count": self.count,
            "total": self.total,
            "min": self.least,
            "mean": self.mean,
            **{f"p{percent}": self.quantile(percent) for percent in QUANTILES},
            "max": self.most,
            "histogram": [
                [start, end, count]
                for start, end, count in zip(self._edges, ends, self.counts, strict=True)
                if count
            ],
        }

    def load(self, record: Mapping[str, Any]) -> None:
        """Take over what ``to_dict`` wrote, in place of what was counted here.

        Raises:
            KeyError, TypeError, ValueError: it isn't such a record.
        """
        counts = [0] * len(self._edges)
        for start, _, count in record["histogram"]:
            counts[self._edges.index(start)] = count
        if sum(counts) != record["count"]:
            raise ValueError(f"its buckets hold {sum(counts)} values and not {record['count']}")
        self.counts, self.count, self.total = counts, record["count"], record["total"]
        self.least, self.most = record["min"], record["max"]
