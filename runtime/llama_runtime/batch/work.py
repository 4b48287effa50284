"""A job that can run: its rows, and what of it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.forms.formats import Format, Record
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.results.retries import merge_retries
from llama_runtime.batch.results.verify import Verdict, verify
from llama_runtime.batch.rows.scan import Scan
from llama_runtime.batch.rows.source import Kind, Rows
from llama_runtime.errors import CaravanError
from llama_runtime.progress import Console


class Work:
    """What there is to do.

    Args:
        name: of the rows' source.
        opened: opens the rows.
        kind: what they are.
        recipe: how they become requests.
        form: what they and their results look like.
        scan: what is known of them; None of a stream that isn't kept.
        ledger: which are done.
        folder: of a job that can be resumed.
        ordered: whether results are in the order of the rows.
        has_changed: asks whether the rows are others than at the first look.

    Attributes:
        statistics: what was counted so far.
    """

    def __init__(
        self,
        name: str,
        opened: Callable[[], AbstractContextManager[Rows]],
        kind: Kind,
        recipe: Recipe,
        form: Format,
        scan: Scan | None,
        ledger: Ledger,
        folder: JobFolder | None,
        *,
        ordered: bool,
        has_changed: Callable[[], bool] = lambda: False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.recipe = recipe
        self.form = form
        self.scan = scan
        self.ledger = ledger
        self.folder = folder
        self.statistics = Statistics()
        self._open = opened
        self._ordered = ordered
        self._has_changed = has_changed

    @property
    def total(self) -> int | None:
        """How many rows there are, if that is known."""
        return None if self.scan is None else self.scan.rows

    @property
    def has_rows_left(self) -> bool:
        """Whether a row isn't done, as far as that is known."""
        return self.statistics.rows != self.total

    @contextmanager
    def records(self) -> Iterator[Iterator[Record]]:
        """All rows; reading them raises if they aren't as many as at the first look.

        Raises:
            CaravanError: at the end, if the rows are others than at the first look.
        """
        with self._open() as rows:
            yield self._as_many(records_of(rows))
        if self._has_changed():
            raise CaravanError(
                f"{self.name} changed while the job ran, and results may be of other rows than it "
                "held: give --force to begin anew"
            )

    def recover(self, console: Console) -> None:
        """Find out what earlier runs have done.

        Raises:
            RequestError: the results were changed since.
            CaravanError: they can't be read.
        """
        if self.folder is None:
            return
        if self.folder.retries.exists():  # of a run that was interrupted
            merge_retries(self.folder, self.form, ordered=self._ordered)
        progress = self.folder.read_progress()
        self._count(progress, console)
        if self.ledger.cut:
            console.say(f"a result that was not whole is cut off: {self.ledger.cut:,} bytes")
        if self.statistics.rows:
            console.say(f"going on: {self.statistics.rows:,} of {self.total:,} rows are done")

    def merge_retries(self, console: Console) -> None:
        """Put the results of rows that were run again in the place of the old ones."""
        assert self.folder is not None
        self.ledger.close()
        merge_retries(self.folder, self.form, ordered=self._ordered)
        self.ledger = self.ledger.anew()
        before = self.statistics
        self._count({}, console)
        self.statistics.keep_times(before)

    def verify(self, records: Iterator[Record]) -> Verdict:
        """Compare all rows with their results."""
        assert self.folder is not None
        assert self.scan is not None
        return verify(
            records,
            self.scan.rows,
            self.form,
            self.ledger.paths,
            self.folder.echoes,
            ordered=self._ordered,
        )

    def _as_many(self, records: Iterator[Record]) -> Iterator[Record]:
        """The same, if nobody changes the file meanwhile: no row may be missing in silence."""
        number = 0
        for number, record in enumerate(records, 1):
            if self.total is not None and number > self.total:
                raise self._other(f"more than the {self.total:,}")
            yield record
        if self.total is not None and number < self.total:
            raise self._other(f"{number:,} of the {self.total:,}")

    def _other(self, many: str) -> CaravanError:
        return CaravanError(
            f"{self.name} changed while the job ran: it holds {many} rows that it had. Put back "
            "what it held, or give --force to begin anew"
        )

    def _count(self, progress: dict[str, object], console: Console) -> None:
        self.statistics = statistics = Statistics()
        with console.status(lambda: [f"reading results: {statistics.rows}/{self.total} rows"]):
            for outcome in self.ledger.recover(progress):
                statistics.count(outcome)
        if isinstance(earlier := progress.get("statistics"), dict):
            statistics.keep_times(Statistics.from_dict(earlier))


def records_of(rows: Rows) -> Iterator[Record]:
    """The rows with their indices."""
    return (Record(index, line) for index, line in enumerate(rows.lines))
