"""The run of a batch job: rows in, result lines out, and what must be known to go on with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.runners.runner import RowRunner

SAMPLE_SECONDS = 0.5  # of the timeline


class Job:
    """Runs rows, and keeps count.

    Args:
        ledger: what is done; the job doesn't close it.
        statistics: what was counted so far.
        folder: where the job's progress is kept; None where it can't be resumed.
        running: asks how many slots are in use.
    """

    def __init__(
        self,
        ledger: Ledger,
        statistics: Statistics,
        folder: JobFolder | None,
        running: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._statistics = statistics
        self._folder = folder
        self._running = running
        self._began = self._sampled = time.monotonic()

    def run(self, runner: RowRunner, records: Iterator[Record]) -> None:
        """Run all rows that aren't done, and write a line for each.

        Raises:
            BackendError: the model failed; the rows that were running aren't done.
            CaravanError: the rows can't be read, or the results can't be written.
        """
        done = self._ledger.done
        left = (record for record in records if record.index not in done)
        self._began = self._sampled = time.monotonic()
        try:
            runner.run(left, self._ledger.has_room, self._finish)
        finally:
            self._sample(time.monotonic())
        self._ledger.sync()
        self._keep()

    def _finish(self, outcome: Outcome) -> None:
        self._ledger.add(outcome)
        self._statistics.count(outcome)
        now = time.monotonic()
        if now - self._sampled >= SAMPLE_SECONDS:
            self._sample(now)
        if self._ledger.sync_if_due():
            self._keep()

    def _sample(self, now: float) -> None:
        self._statistics.sample(now - self._began, self._running())
        self._sampled = now

    def _keep(self) -> None:
        if self._folder is not None:
            progress = {**self._ledger.lengths(), "statistics": self._statistics.to_dict()}
            self._folder.write_progress(progress)
