"""How far a job was at each moment of its work, in as many samples as a chart can show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

MAX_SAMPLES = 1000  # as many never stay: the resolution is halved when there are
FINEST_SECONDS = 0.125  # between samples; a power of two, so that halving it is exact


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment of a job.

    Attributes:
        seconds: of work since the job began, all its runs put end to end.
        rows: that had ended by then.
        prompt_tokens: of these rows.
        completion_tokens: of these rows.
        running: slots in use, the mean since the sample before.
    """

    seconds: float
    rows: int
    prompt_tokens: int
    completion_tokens: int
    running: float


@dataclass(frozen=True, slots=True)
class Piece:
    """What a job did in a piece of its time, as means over that.

    Attributes:
        start: seconds since the job began.
        end: likewise.
        rows: that ended, a second.
        prompt_tokens: of these rows, a second.
        completion_tokens: of these rows, a second.
        running: slots in use.
    """

    start: float
    end: float
    rows: float
    prompt_tokens: float
    completion_tokens: float
    running: float


COLUMNS = tuple(field.name for field in fields(Sample))

_Sums = tuple[float, float, float, float]


class Timeline:
    """Samples of a job, thinned evenly as it gets longer.

    Time is cut into cells of ``resolution`` seconds, and a cell keeps its last sample. Old and new
    ones are as far apart, so a long job is as clear at its beginning as at its end.

    Attributes:
        samples: in the order of time, fewer than ``MAX_SAMPLES``.
        resolution: seconds of a cell.
        runs: how often the job was begun or taken up again.
        marks: the seconds at which runs began; of those within a cell the first.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.resolution = FINEST_SECONDS
        self.runs = 1
        self.marks = [0.0]
        self._began = 0.0

    @property
    def seconds(self) -> float:
        """Work so far, up to the last sample."""
        return self.samples[-1].seconds if self.samples else 0.0

    def begin_run(self) -> None:
        """From here on, seconds are those of another run, which follows the last sample."""
        self.runs += 1
        self._began = self.seconds
        self._mark(self._began)

    def add(
        self, seconds: float, rows: int, prompt_tokens: int, completion_tokens: int, running: float
    ) -> None:
        """Note how far the job is.

        Args:
            seconds: since this run began; never less than before.
            rows: that have ended, in all runs.
            prompt_tokens: of these rows.
            completion_tokens: of these rows.
            running: slots in use.
        """
        at = max(self._began + seconds, self.seconds)
        self._put(Sample(at, rows, prompt_tokens, completion_tokens, running))
        if len(self.samples) >= MAX_SAMPLES:
            # Far below the limit, or samples that lie unevenly would have this done for each.
            while len(self.samples) > MAX_SAMPLES // 2:
                self._thin()

    def _thin(self) -> None:
        self.resolution *= 2
        samples, self.samples = self.samples, []
        for sample in samples:
            self._put(sample)
        marks, self.marks = self.marks, []
        for mark in marks:
            self._mark(mark)

    def _cell(self, seconds: float) -> int:
        return int(seconds // self.resolution)

    def _mark(self, seconds: float) -> None:
        if not self.marks or self._cell(self.marks[-1]) != self._cell(seconds):
            self.marks.append(seconds)

    def _put(self, sample: Sample) -> None:
        """Append a sample, in place of the last one if that lies in the same cell."""
        last = self.samples[-1] if self.samples else None
        if last is not None and self._cell(last.seconds) == self._cell(sample.seconds):
            self.samples.pop()
            sample = _joined(self.seconds, last, sample)
        self.samples.append(sample)

    def pieces(self, most: int) -> list[Piece]:
        """The job's time cut into equal pieces; between two samples work goes on evenly.

        Args:
            most: pieces; there are no more than samples, and none if no time has passed.
        """
        count = min(most, len(self.samples))
        if not self.seconds:
            return []
        ends = [self.seconds * (i + 1) / count for i in range(count)]
        pieces, start, before = [], 0.0, (0.0, 0.0, 0.0, 0.0)
        for end, sums in zip(ends, self._sums_at(ends), strict=True):
            rates = ((new - old) / (end - start) for new, old in zip(sums, before, strict=True))
            pieces.append(Piece(start, end, *rates))
            start, before = end, sums
        return pieces

    def _sums_at(self, moments: Iterable[float]) -> Iterator[_Sums]:
        """Rows, tokens in and out, and seconds of slots in use, up to each of some moments."""
        samples = iter(self.samples)
        since, then = 0.0, 0.0
        low: _Sums = (0.0, 0.0, 0.0, 0.0)
        high = low
        for moment in moments:
            while then < moment and (sample := next(samples, None)) is not None:
                since, low = then, high
                then, slots = sample.seconds, high[3] + sample.running * (sample.seconds - then)
                high = (sample.rows, sample.prompt_tokens, sample.completion_tokens, slots)
            part = (moment - since) / (then - since) if then > since else 1.0
            yield _between(low, high, min(part, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; ``samples`` is a list of rows under ``columns``."""
        return {
            "runs": self.runs,
            "runs_began": list(self.marks),
            "resolution": self.resolution,
            "columns": list(COLUMNS),
            "samples": [list(astuple(sample)) for sample in self.samples],
        }

    def load(self, record: Mapping[str, Any]) -> None:
        """Take over what ``to_dict`` wrote, in place of what is here.

        Raises:
            KeyError, TypeError, ValueError: it isn't such a record.
        """
        if tuple(record["columns"]) != COLUMNS:
            raise ValueError(f"its samples have the columns {record['columns']}")
        self.samples = [Sample(*sample) for sample in record["samples"]]
        self.resolution = float(record["resolution"])
        self.runs, self.marks = int(record["runs"]), list(record["runs_began"])


def _between(low: _Sums, high: _Sums, part: float) -> _Sums:
    a, b, c, d = (old + (new - old) * part for old, new in zip(low, high, strict=True))
    return a, b, c, d


def _joined(since: float, first: Sample, second: Sample) -> Sample:
    """The later of two neighbours, with the slots of the time of both."""
    time = second.seconds - since
    if time <= 0:
        return second
    slots = first.running * (first.seconds - since) + second.running * (
        second.seconds - first.seconds
    )
    return Sample(
        second.seconds,
        second.rows,
        second.prompt_tokens,
        second.completion_tokens,
        slots / time,
    )
