"""Rows to result lines: what runs them, and the one that does so in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from llama_runtime.batch.forms.formats import Format, Record, Task
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.runners.prefetch import Prefetch
from llama_runtime.completion import Completion, Request
from llama_runtime.errors import BackendError, CaravanError, RequestError
from llama_runtime.llm import LLM
from llama_runtime.shared_engine import Stats

HasRoom = Callable[[], bool]
Finish = Callable[[Outcome], None]


class RowRunner(Protocol):
    """Runs rows, each to a result line."""

    @property
    def num_slots(self) -> int:
        """Sequences that may run at once."""

    @property
    def about(self) -> Mapping[str, object]:
        """What there is to work with, for the report."""

    def stats(self) -> Stats:
        """How much was done, and how many sequences run."""

    def run(self, records: Iterator[Record], has_room: HasRoom, finish: Finish) -> None:
        """Run all rows.

        Args:
            records: the rows; drawn ahead of need, from another thread.
            has_room: whether a further row may begin. While a row runs, no other one begins before
                this says so; where none runs, one begins in any case.
            finish: told of each row that ended, from the thread that calls this.

        Raises:
            BackendError: the model failed; rows that were running didn't end.
            CaravanError: the rows can't be read on, or ``finish`` has failed.
        """


@dataclass(slots=True)
class _Running:
    """A row that runs; ``completions`` are those of each of its requests."""

    record: Record
    task: Task
    began: float
    left: int  # requests
    completions: list[list[Completion]]


class LocalRunner:
    """Runs rows through a model in this process.

    Rows are read and become tokens in another thread, while the model works.

    Args:
        llm: the model, which isn't closed.
        form: how rows become requests, and completions lines.
    """

    def __init__(self, llm: LLM, form: Format) -> None:
        self._llm = llm
        self._form = form
        # By the number of a request in the order in which the model draws them: its row, and its
        # place among the row's requests.
        self._running: dict[int, tuple[_Running, int]] = {}
        self._finish: Finish = lambda _: None
        self._broken_off: CaravanError | None = None  # why no further rows can be read

    @property
    def num_slots(self) -> int:
        """See ``RowRunner``."""
        return self._llm.max_batch

    @property
    def about(self) -> dict[str, object]:
        """See ``RowRunner``."""
        llm = self._llm
        return {"max_batch": llm.max_batch, "max_len": llm.max_len, "threads": llm.threads}

    def stats(self) -> Stats:
        """See ``RowRunner.stats``."""
        return self._llm.stats()

    def run(self, records: Iterator[Record], has_room: HasRoom, finish: Finish) -> None:
        """See ``RowRunner.run``."""
        self._finish, self._broken_off = finish, None
        ready = Prefetch(map(self._prepared, records), 2 * self._llm.max_batch)
        try:
            for number, completion in self._llm.run(self._requests(ready, has_room)):
                if isinstance(completion.error, BackendError) and self._llm.health() == "failed":
                    raise completion.error  # no fault of the row, which runs when the job goes on
                self._take(number, completion)
        finally:
            ready.close()
        if self._broken_off is not None:
            raise self._broken_off

    def _prepared(self, record: Record) -> tuple[Record, Task | RequestError]:
        try:
            return record, self._form.task(record)
        except RequestError as error:
            return record, error

    def _requests(
        self, ready: Prefetch[tuple[Record, Task | RequestError]], has_room: HasRoom
    ) -> Iterator[Request | None]:
        """The requests of the rows that can run; None while no further one should begin."""
        drawn = 0
        while True:
            while self._running and not has_room():
                yield None
            try:
                item = ready.take(wait=not self._running)
            except StopIteration:
                return
            except CaravanError as error:
                self._broken_off = error  # what runs is to end first
                return
            if item is None:
                yield None
                continue
            record, task = item
            if isinstance(task, RequestError):
                self._finish(self._failed(record, task, None))
                continue
            requests = task.requests
            completions: list[list[Completion]] = [[] for _ in requests]
            row = _Running(record, task, time.monotonic(), len(requests), completions)
            for place, request in enumerate(requests):
                self._running[drawn] = row, place
                drawn += 1
                yield request

    def _take(self, number: int, completion: Completion) -> None:
        row, place = self._running[number]
        have = row.completions[place]
        have.append(completion)
        # A request that could not be added has one completion, which never became a prompt.
        if len(have) < row.task.requests[place].params.n and completion.num_prompt_tokens:
            return
        have.sort(key=lambda done: done.sample)
        del self._running[number]
        row.left -= 1
        if row.left == 0:
            self._finish(self._outcome(row))

    def _outcome(self, row: _Running) -> Outcome:
        for place, completions in enumerate(row.completions):
            for completion in completions:
                if completion.error is not None:
                    error = row.task.explained(completion.error, place)
                    return self._failed(row.record, error, row)
        return _outcome(row.record, row.task.answer(row.completions), None, row)

    def _failed(self, record: Record, error: CaravanError, row: _Running | None) -> Outcome:
        line = self._form.failure(record, error, row.completions if row else ())
        return _outcome(record, line, str(error), row)


def _outcome(record: Record, line: bytes, error: str | None, row: _Running | None) -> Outcome:
    groups = row.completions if row else []
    completions = [completion for group in groups for completion in group]
    return Outcome(
        index=record.index,
        line=line,
        error=error,
        prompt_tokens=sum(group[0].num_prompt_tokens for group in groups),
        completion_tokens=sum(len(completion.token_ids) for completion in completions),
        finish_reasons=tuple(c.finish_reason for c in completions) or ("error",),
        seconds=time.monotonic() - row.began if row else 0.0,
    )
