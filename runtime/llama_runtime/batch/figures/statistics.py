"""What is counted of a job while it runs, in memory that doesn't grow with the rows."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Mapping
from typing import Any

from llama_runtime.batch.figures.histogram import SECOND_EDGES, TOKEN_EDGES, Histogram
from llama_runtime.batch.figures.timeline import Timeline
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.errors import CaravanError, one_line

MAX_ERRORS = 10  # whose messages are kept
MAX_ERROR_CHARS = 500  # a message may quote what a row holds


class Statistics:
    """What became of the rows so far.

    Attributes:
        rows: how many ended, in whatever way.
        failed: how many of them with an error.
        prompt_tokens: of all rows.
        completion_tokens: of all rows.
        finish_reasons: how many completions ended for each reason.
        first_errors: index and message of the failed rows with the lowest indexes, in their order.
        per_row: histograms by "prompt_tokens", "completion_tokens" and "seconds". They leave out
            rows without prompt tokens, which never ran.
        timeline: how far the job was at each moment of its work.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.failed = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.finish_reasons: Counter[str] = Counter()
        self.first_errors: list[tuple[int, str]] = []
        self.per_row = {
            "prompt_tokens": Histogram(TOKEN_EDGES),
            "completion_tokens": Histogram(TOKEN_EDGES),
            "seconds": Histogram(SECOND_EDGES),
        }
        self.timeline = Timeline()

    @property
    def first_error(self) -> tuple[int, str] | None:
        """Index and message of the failed row with the lowest index, or None."""
        return self.first_errors[0] if self.first_errors else None

    def count(self, outcome: Outcome) -> None:
        """Add one row that ended."""
        self.rows += 1
        self.prompt_tokens += outcome.prompt_tokens
        self.completion_tokens += outcome.completion_tokens
        self.finish_reasons.update(outcome.finish_reasons)
        if outcome.prompt_tokens:
            self.per_row["prompt_tokens"].add(outcome.prompt_tokens)
            self.per_row["completion_tokens"].add(outcome.completion_tokens)
            if outcome.seconds is not None:
                self.per_row["seconds"].add(outcome.seconds)
        if outcome.error is not None:
            self.failed += 1
            insort(self.first_errors, (outcome.index, _shortened(outcome.error)))
            del self.first_errors[MAX_ERRORS:]

    def sample(self, seconds: float, running: int) -> None:
        """Note how far the job is; worth doing a few times a second, and once at the end of a run.

        Args:
            seconds: since this run began.
            running: slots in use now.
        """
        self.timeline.add(seconds, self.rows, self.prompt_tokens, self.completion_tokens, running)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: all that ``from_dict`` needs, and figures that follow from it."""
        seconds = self.timeline.seconds
        return {
            "rows": self.rows,
            "failed": self.failed,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": seconds,
            "rows_per_second": _rate(self.rows, seconds),
            "prompt_tokens_per_second": _rate(self.prompt_tokens, seconds),
            "completion_tokens_per_second": _rate(self.completion_tokens, seconds),
            "finish_reasons": dict(self.finish_reasons.most_common()),
            "first_errors": [{"index": i, "message": text} for i, text in self.first_errors],
            "per_row": {name: histogram.to_dict() for name, histogram in self.per_row.items()},
            "timeline": self.timeline.to_dict(),
        }

    def keep_times(self, earlier: Statistics) -> None:
        """Take over what result lines don't say: how long rows took, and when they ended."""
        self.per_row["seconds"] = earlier.per_row["seconds"]
        self.timeline = earlier.timeline

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Statistics:
        """Go on from what earlier runs counted: a further run begins.

        Args:
            record: from ``to_dict``.

        Raises:
            CaravanError: it isn't such a record.
        """
        self = cls()
        try:
            for name in ("rows", "failed", "prompt_tokens", "completion_tokens"):
                setattr(self, name, int(record[name]))
            self.finish_reasons.update({k: int(n) for k, n in record["finish_reasons"].items()})
            self.first_errors = [(int(e["index"]), e["message"]) for e in record["first_errors"]]
            for name, histogram in self.per_row.items():
                histogram.load(record["per_row"][name])
            self.timeline.load(record["timeline"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CaravanError(
                f"the statistics of the job's earlier runs can't be read: {type(error).__name__}, "
                f"{one_line(error)}; they were written by another version or changed"
            ) from error
        self.timeline.begin_run()
        return self


def _rate(amount: int, seconds: float) -> float | None:
    return amount / seconds if seconds else None


def _shortened(message: str) -> str:
    return message if len(message) <= MAX_ERROR_CHARS else message[: MAX_ERROR_CHARS - 1] + "…"
