"""The run of a batch job: rows in, result lines out, in order, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from llama_runtime.batch.recipe import Recipe
from llama_runtime.batch.results import InOrder, ResultFile, result_line
from llama_runtime.batch.rows import Row, Rows
from llama_runtime.completion import Completion, Request
from llama_runtime.errors import RequestError
from llama_runtime.llm import LLM

# Finished results that may wait for an earlier one, for each slot. When that many do, no new row is
# begun until the one they wait for is done.
WAITING_PER_SLOT = 8


@dataclass(slots=True)
class Tally:
    """What became of the rows so far.

    Attributes:
        rows: how many ended, in whatever way.
        failed: how many of them with an error.
        prompt_tokens: of the rows that ran.
        completion_tokens: of the rows that ran.
        first_error: index and message of the first row that failed, or None.
    """

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_error: tuple[int, str] | None = None

    def count(self, row: Row, completions: Seq[Completion]) -> None:
        """Add one row that ended."""
        self.rows += 1
        self.prompt_tokens += completions[0].num_prompt_tokens
        self.completion_tokens += sum(len(completion.token_ids) for completion in completions)
        errors = [c.error for c in completions if c.finish_reason == "error"]
        if errors:
            self.failed += 1
            self.first_error = self.first_error or (row.index, str(errors[0]))


class Job:
    """Runs rows through a model.

    Args:
        llm: the model; the job doesn't close it.
        recipe: how a row becomes a request.
        results: where the lines go; the job doesn't close it.

    Attributes:
        tally: what became of the rows, kept up to date while it runs.
    """

    def __init__(self, llm: LLM, recipe: Recipe, results: ResultFile) -> None:
        self.tally = Tally()
        self._llm = llm
        self._recipe = recipe
        self._in_order = InOrder(results.write)
        self._max_waiting = WAITING_PER_SLOT * llm.max_batch
        self._in_flight: dict[int, tuple[Row, Request, list[Completion]]] = {}

    def run(self, rows: Rows) -> None:
        """Run all rows and write a line for each.

        Raises:
            BackendError: the model failed; rows that were running have their line.
            CaravanError: the results can't be written.
        """
        for number, completion in self._llm.run(self._requests(rows)):
            row, request, completions = self._in_flight[number]
            completions.append(completion)
            # A request that could not be added has one completion, which never became a prompt.
            if len(completions) == request.params.n or not completion.num_prompt_tokens:
                del self._in_flight[number]
                completions.sort(key=lambda completion: completion.sample)
                self._finish(row, completions, request.params.seed)

    def _requests(self, rows: Rows) -> Iterator[Request | None]:
        """The requests of the rows that can run; None while no further one should begin."""
        drawn = 0
        while True:
            while self._in_flight and not (self._has_room() and rows.ready()):
                yield None
            row = next(rows, None)
            if row is None:
                return
            try:
                request = self._recipe.request(row)
            except RequestError as error:
                self._finish(row, [Completion("", [], "error", error=error)], None)
                continue
            self._in_flight[drawn] = row, request, []
            drawn += 1
            yield request

    def _has_room(self) -> bool:
        return self._in_order.num_waiting < self._max_waiting

    def _finish(self, row: Row, completions: Seq[Completion], seed: int | None) -> None:
        self.tally.count(row, completions)
        self._in_order.add(row.index, result_line(row, completions, seed))
