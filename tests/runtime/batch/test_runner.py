"""The runner in this process: what runs when, what it keeps waiting, and how it fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_runtime.backends.fake import Fake
from llama_runtime.backends.faulty import Faulty
from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.forms.prompt_format import PromptFormat
from llama_runtime.batch.job import Job
from llama_runtime.batch.results.in_order import InOrder
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.rows.lines import Line
from llama_runtime.batch.runners.runner import LocalRunner
from llama_runtime.errors import BackendError
from llama_runtime.llm import LLM
from llama_runtime.step_batch import Step
from tests.runtime.batch.jobs import Given, mixed_rows, recipe_of, results_in, run_job


class Rows:
    """A slow first row, then quick rows or bad ones; counts what is drawn."""

    def __init__(self, bad: bool, limit: int) -> None:
        self.drawn = 0
        self._bad, self._limit = bad, limit

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        if self.drawn == self._limit:
            raise StopIteration
        index, self.drawn = self.drawn, self.drawn + 1
        row = {"prompt": "row", "max_tokens": 200 if index == 0 else 1}
        text = "{bad" if index and self._bad else json.dumps(row)
        return Record(index, Line(index + 1, text))


@pytest.mark.parametrize("bad", [False, True])
def test_results_that_wait_for_a_slow_row_are_bounded(
    fake_llm: LLM, tmp_path: Path, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so are the rows that are read ahead."""
    monkeypatch.setattr("llama_runtime.growth.finish_reason", _only_length)
    path = tmp_path / "out.jsonl"
    form = PromptFormat(recipe_of(fake_llm), is_object=True)
    rows, ledger = Rows(bad, limit=1000), Ledger(form, path)
    ledger.window = 8  # which fills while the first row runs, also where rows are read slowly
    waiting: list[int] = []
    ahead: list[int] = []

    def add(self: InOrder, outcome: Outcome) -> None:
        added(self, outcome)
        waiting.append(self.num_waiting)
        ahead.append(rows.drawn - len(waiting))

    added = InOrder.add
    monkeypatch.setattr(InOrder, "add", add)
    Job(ledger, Statistics(), None, lambda: 0).run(LocalRunner(fake_llm, form), iter(rows))
    ledger.close()
    assert ledger.window <= max(waiting) <= ledger.window + 2 * fake_llm.max_batch
    assert max(ahead) <= 4 * fake_llm.max_batch + 2
    assert [record["index"] for record in results_in(path)] == list(range(1000))


def _only_length(seq: Any, eos_token_ids: Any) -> str | None:
    return "length" if seq.num_completion_tokens == seq.params.max_tokens else None


def test_a_row_that_has_not_arrived_holds_up_no_other(fake_llm: LLM, tmp_path: Path) -> None:
    form = PromptFormat(recipe_of(fake_llm), is_object=True)
    ledger = Ledger(form, tmp_path / "out.jsonl")
    ledger.window = 32

    class Interactive(Rows):
        """Sends a row, and the next one only when it has seen the answer."""

        def __next__(self) -> Record:
            end = time.monotonic() + 10
            while ledger.num_written < self.drawn:
                assert time.monotonic() < end, "a job must not wait for a row while others run"
                time.sleep(0.001)
            return super().__next__()

    rows = Interactive(bad=False, limit=5)
    Job(ledger, Statistics(), None, lambda: 0).run(LocalRunner(fake_llm, form), iter(rows))
    ledger.close()
    assert ledger.num_written == 5


@pytest.mark.parametrize("ordered", [True, False])
def test_a_model_that_fails_leaves_what_was_running_to_the_next_run(
    fake_llm: LLM, tmp_path: Path, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    real = Fake.run

    def fail_later(self: Fake, step: Step) -> Any:
        nonlocal steps
        steps += 1
        if steps > 40:
            raise BackendError("the graph failed")
        return real(self, step)

    path, journal = tmp_path / "out.jsonl", tmp_path / "ahead"
    run_job(fake_llm, mixed_rows(60), tmp_path / "whole.jsonl")
    whole = results_in(tmp_path / "whole.jsonl")
    ended: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Fake, "run", fail_later)
        with (
            LLM(fake_llm.bundle.path, max_batch=4, max_len=256, threads=1) as failing,
            pytest.raises(BackendError, match="the graph failed"),
        ):
            run_job(
                *(failing, mixed_rows(60), path),
                journal=journal,
                ordered=ordered,
                ended=lambda outcome: ended.append(outcome.index),
            )
    found = results_in(path)
    assert 0 < len(found) < 60
    if ordered:
        assert [record["index"] for record in found] == list(range(len(found)))
    assert all(record["error"] is None for record in found), "it was no fault of a row"
    first = ended.copy()
    run_job(
        *(fake_llm, mixed_rows(60), path),
        journal=journal,
        ordered=ordered,
        ended=lambda outcome: ended.append(outcome.index),
    )
    assert sorted(ended) == list(range(60)), "what ended in the first run isn't run again"
    assert len(first) > 5
    found = results_in(path)
    assert (found if ordered else sorted(found, key=lambda record: record["index"])) == whole


def test_a_row_that_the_model_can_not_run_fails_alone(
    fake_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(fake_llm, mixed_rows(20), tmp_path / "whole.jsonl")
    whole = results_in(tmp_path / "whole.jsonl")

    def make(*_: object, num_slots: int, capacity: int, **__: object) -> Faulty:
        return Faulty(Fake(num_slots, capacity, 258), {0: "raise"}, victim=5)

    monkeypatch.setattr("llama_runtime.loading.OrtCpu", make)
    path = tmp_path / "out.jsonl"
    with LLM(fake_llm.bundle.path, max_batch=4, max_len=256, threads=1, prefix_tokens=0) as struck:
        statistics = run_job(struck, mixed_rows(20), path)
    found = results_in(path)
    assert (statistics.failed, found[5]["finish_reason"]) == (1, "error")
    assert "was told to fail" in found[5]["error"]
    assert found[:5] + found[6:] == whole[:5] + whole[6:]


def test_what_ended_before_its_turn_is_not_asked_of_the_model_again(
    fake_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed loses the rows that ran, and no row that had ended."""
    asked: list[int] = []
    task = PromptFormat.task

    def counting(self: PromptFormat, record: Record) -> Any:
        asked.append(record.index)
        return task(self, record)

    monkeypatch.setattr(PromptFormat, "task", counting)
    path, journal = tmp_path / "out.jsonl", tmp_path / "ahead"
    rows: list[Given] = [{"prompt": "slow", "max_tokens": 200, "ignore_eos": True}]
    rows += [{"prompt": f"quick {i}", "max_tokens": 1 + i % 3} for i in range(60)]
    ended: list[int] = []

    class Killed(Exception):  # noqa: N818 - not an error of the program
        pass

    def end(outcome: Outcome) -> None:
        if len(ended) == 25:
            raise Killed
        ended.append(outcome.index)

    with pytest.raises(Killed):
        run_job(fake_llm, rows, path, journal=journal, ended=end)
    assert not path.exists(), "all wait for the first"
    asked.clear()
    run_job(fake_llm, rows, path, journal=journal)
    assert sorted(asked) == sorted(set(range(61)) - set(ended))
    assert [record["index"] for record in results_in(path)] == list(range(61))
