"""Several processes that run the rows of one job: a queue for all, and a model in each.

A process that dies is started again. The rows that it was running run once more, in a process that
runs no others meanwhile. If that dies too, they are split into smaller and smaller groups, until
the row that kills it is alone; it is reported as failed, and the others aren't.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator
from typing import Any

from llama_runtime.batch.forms.formats import Format, Record
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.runners.places import Place
from llama_runtime.batch.runners.prefetch import Prefetch
from llama_runtime.batch.runners.runner import Finish, HasRoom
from llama_runtime.batch.runners.worker import AHEAD, Inbox, Worker
from llama_runtime.batch.runners.worker_process import outcome_of
from llama_runtime.errors import BackendError, CaravanError
from llama_runtime.shared_engine import Stats

SPLIT = 8  # groups that rows which killed two processes are split into, again and again
MAX_DEATHS = 8  # of processes, with no row that ended between them
_POLL_SECONDS = 0.1  # in which a row that comes by a slow stream is noticed


class WorkerPool:
    """Runs rows in several processes; see ``RowRunner``.

    Args:
        places: one for each process.
        form: how rows that a process died of are reported.

    Attributes:
        num_deaths: of processes, so far.

    Raises:
        BackendError: a process can't load the model.
    """

    def __init__(self, places: list[Place], form: Format) -> None:
        self._form = form
        self._inbox: Inbox = queue.SimpleQueue()
        self._workers: list[Worker] = []
        self._suspects: deque[list[Record]] = deque()  # groups of rows that killed a process
        self._finish: Finish = lambda _: None
        self._broken_off: CaravanError | None = None  # why no further rows can be read
        self._is_complete = False
        self._prompt_tokens = self._completion_tokens = 0
        self.num_deaths = self._deaths_in_a_row = 0
        try:
            for place in places:  # one after the other: each looks what memory the others left
                self._workers.append(Worker(place, self._inbox))
                while not self._workers[-1].num_slots:
                    self._take_message(wait=True)
            self._is_complete = True
        except BaseException:
            self.close()
            raise

    @property
    def num_slots(self) -> int:
        """Sequences that may run at once, in all processes."""
        return sum(worker.num_slots for worker in self._workers)

    @property
    def about(self) -> dict[str, Any]:
        """What a process has to work with."""
        return {"workers": len(self._workers), **self._workers[0].about}

    def stats(self) -> Stats:
        """How much was done; the tokens of a row count when it ends."""
        running = sum(min(len(each.rows), each.num_slots) for each in self._workers)
        return Stats(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            running=running,
        )

    def run(self, records: Iterator[Record], has_room: HasRoom, finish: Finish) -> None:
        """See ``RowRunner.run``."""
        self._finish, self._broken_off = finish, None
        rows = Prefetch(records, max(AHEAD * self.num_slots, 1))
        try:
            are_left = True
            while are_left or self._suspects or self._is_busy:
                are_left = are_left and self._hand_out(rows, has_room)
                self._retry_suspects()
                if are_left or self._suspects or self._is_busy:
                    self._take_message(wait=not are_left)
        finally:
            rows.close()
        if self._broken_off is not None:
            raise self._broken_off

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()

    @property
    def _is_busy(self) -> bool:
        return any(worker.rows for worker in self._workers)

    def _hand_out(self, rows: Prefetch[Record], has_room: HasRoom) -> bool:
        """Give rows to those who have room; whether there may be more rows."""
        while not self._is_busy or has_room():
            worker = max(self._workers, key=lambda each: each.room)
            if worker.room <= 0 or (self._suspects and not worker.rows):
                break
            try:
                record = rows.take(wait=not self._is_busy)
            except StopIteration:
                return False
            except CaravanError as error:
                self._broken_off = error  # what runs is to end first
                return False
            if record is None:
                break
            worker.run(record)
        return True

    def _retry_suspects(self) -> None:
        for worker in self._workers:
            if self._suspects and worker.num_slots and not worker.rows and worker.is_alive:
                worker.run_group(self._suspects.popleft())

    def _take_message(self, *, wait: bool) -> None:
        try:
            worker, message = self._inbox.get(timeout=None if wait else _POLL_SECONDS)
        except queue.Empty:
            return
        if message is None:
            self._replace(worker)
        elif "ready" in message:
            worker.about = message["ready"]
            worker.num_slots = worker.about["max_batch"]
        elif "failed" in message:
            worker.failure = message["failed"]
        else:
            self._take_outcome(worker, outcome_of(message))

    def _take_outcome(self, worker: Worker, outcome: Outcome) -> None:
        del worker.rows[outcome.index]
        if not worker.rows:
            worker.group = 0
        self._deaths_in_a_row = 0
        self._prompt_tokens += outcome.prompt_tokens
        self._completion_tokens += outcome.completion_tokens
        self._finish(outcome)

    def _replace(self, worker: Worker) -> None:
        """Start a process again that has died."""
        words = worker.last_words()
        if not self._is_complete:
            raise BackendError(f"a process of --workers can't start: {words}")
        self.num_deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > MAX_DEATHS:
            raise BackendError(f"the processes of --workers die one after the other: {words}")
        rows = sorted(worker.rows.values(), key=lambda record: record.index)
        if worker.group == 1:
            self._deaths_in_a_row = 0  # the culprit is known
            self._fail(rows[0], words)
        elif rows:
            size = -(-len(rows) // SPLIT) if worker.group else len(rows)
            groups = [rows[at : at + size] for at in range(0, len(rows), size)]
            self._suspects.extendleft(reversed(groups))
        self._workers[self._workers.index(worker)] = Worker(worker.place, self._inbox)

    def _fail(self, record: Record, words: str) -> None:
        error = BackendError(
            "several processes died while they ran this row, the last one when it ran nothing else "
            f"({words})"
        )
        line = self._form.failure(record, error, ())
        self._finish(Outcome(record.index, line, str(error), 0, 0, ("error",), None))
