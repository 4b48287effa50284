"""Batch jobs: one whole line a row, in order, whatever the rows are and whatever ends first."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest

from llama_runtime.backends.fake import Fake
from llama_runtime.batch import job as job_module
from llama_runtime.batch.job import Job, Tally
from llama_runtime.batch.lines import LineReader
from llama_runtime.batch.recipe import Recipe
from llama_runtime.batch.results import InOrder, ResultFile
from llama_runtime.batch.rows import Row, Rows
from llama_runtime.completion import Completion, Request
from llama_runtime.errors import BackendError, RequestError
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams, row_seed
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.step_batch import Step


def rows_of(records: list[dict[str, Any] | str]) -> Rows:
    """Rows of JSON objects, or of lines as they are."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    return Rows(LineReader(io.BytesIO("\n".join(lines).encode())), jsonl=True)


def recipe_of(llm: LLM, chat: bool | None = False, **options: Any) -> Recipe:
    encoder = PromptEncoder(llm.bundle)
    return Recipe.of_job(encoder, llm.default_params, {"max_tokens": 24, **options}, chat)


def run(
    llm: LLM, records: list[dict[str, Any] | str], path: Path, recipe: Recipe | None = None
) -> tuple[list[dict[str, Any]], Job]:
    """The results of a job, read back from its file."""
    results = ResultFile(path, force=True)
    job = Job(llm, recipe or recipe_of(llm), results)
    try:
        job.run(rows_of(records))
    finally:
        results.close()
    return [json.loads(line) for line in path.read_bytes().splitlines()], job


def mixed_rows(count: int) -> list[dict[str, Any] | str]:
    """Rows whose lengths are so different that they end in another order than they begin."""
    return [
        {"prompt": f"row {i} " + "x" * (i * 37 % 90), "max_tokens": 1 + i * 23 % 60}
        for i in range(count)
    ]


def test_results_come_in_the_order_of_the_rows_whatever_ends_first(
    fake_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []

    def count(self: Tally, row: Row, completions: Seq[Completion]) -> None:
        ended.append(row.index)
        counted(self, row, completions)

    counted = Tally.count
    monkeypatch.setattr(Tally, "count", count)
    found, job = run(fake_llm, mixed_rows(40), tmp_path / "out.jsonl")
    assert [record["index"] for record in found] == list(range(40))
    assert ended != sorted(ended), "the rows were meant to end out of order"
    assert {record["finish_reason"] for record in found} == {"stop", "length"}
    assert job.tally.completion_tokens == sum(len(record["token_ids"]) for record in found)


def test_a_result_has_the_documented_keys_in_order(fake_llm: LLM, tmp_path: Path) -> None:
    (record,), _ = run(fake_llm, [{"prompt": "héllo", "seed": 5}], tmp_path / "out.jsonl")
    assert list(record) == [
        "index",
        "prompt",
        "text",
        "token_ids",
        "finish_reason",
        "usage",
        "seed",
        "error",
    ]
    assert (record["prompt"], record["seed"], record["error"]) == ("héllo", 5, None)
    assert record["usage"] == {
        "prompt_tokens": len("héllo".encode()),
        "completion_tokens": len(record["token_ids"]),
    }
    assert "héllo".encode() in (tmp_path / "out.jsonl").read_bytes(), "text is UTF-8, not escaped"


def test_rows_give_what_they_give_alone(fake_llm: LLM, tmp_path: Path) -> None:
    records = mixed_rows(12)
    together, _ = run(fake_llm, records, tmp_path / "all.jsonl")
    for index in (0, 5, 11):
        (alone,), _ = run(fake_llm, [records[index]], tmp_path / f"{index}.jsonl")
        assert alone["token_ids"] == together[index]["token_ids"]
        assert alone["text"] == together[index]["text"]


BAD_ROWS: list[dict[str, Any] | str] = [
    "{broken",
    {},
    {"prompt": ""},
    {"prompt": "a", "messages": []},
    {"messages": []},
    {"messages": [{"role": "bad", "content": "a"}]},
    {"messages": [{"role": "user"}]},
    {"prompt": "a", "temperature": -1},
    {"prompt": "a", "temperature": "hot"},
    {"prompt": "a", "top_p": 0},
    {"prompt": "a", "top_p": True},
    {"prompt": "a", "seed": -1},
    {"prompt": "a", "max_tokens": 0},
    {"prompt": "a", "max_tokens": 1.5},
    {"prompt": "a", "max_tokens": 10**400},
    {"prompt": "a", "best_of": 3},
    {"prompt": "x" * 300},
    {"prompt": "x" * 600},
]


def test_a_bad_row_fails_alone_and_says_why(fake_llm: LLM, tmp_path: Path) -> None:
    good = mixed_rows(len(BAD_ROWS))
    mixed = [record for pair in zip(good, BAD_ROWS, strict=True) for record in pair]
    expected, _ = run(fake_llm, good, tmp_path / "good.jsonl")
    found, job = run(fake_llm, mixed, tmp_path / "mixed.jsonl")
    assert [record["index"] for record in found] == list(range(len(mixed)))
    for before, after in zip(expected, found[::2], strict=True):
        assert after["error"] is None
        assert after["text"] == before["text"]
    for record in found[1::2]:
        assert record["finish_reason"] == "error"
        assert record["error"]
        assert "\n" not in record["error"]
        assert (record["text"], record["token_ids"]) == ("", [])
    assert job.tally.failed == len(BAD_ROWS)
    assert job.tally.first_error == (1, found[1]["error"])


def test_a_row_over_a_limit_names_both_numbers(fake_llm: LLM, tmp_path: Path) -> None:
    found, _ = run(fake_llm, [{"prompt": "x" * 300}, {"prompt": "x" * 600}], tmp_path / "o")
    assert (
        "300 prompt tokens and max_tokens 24 need 324 tokens, over max_len 256"
        in (found[0]["error"])
    )
    assert (
        "600 prompt tokens and max_tokens 24 need 624 tokens, over the model's limit 512"
        in (found[1]["error"])
    )


def test_a_row_alone_with_its_recorded_seed_gives_the_same_text(
    fake_llm: LLM, tmp_path: Path
) -> None:
    records: list[dict[str, Any] | str] = [{"prompt": f"tell {i}"} for i in range(10)]
    recipe = recipe_of(fake_llm, temperature=1.0)
    found, _ = run(fake_llm, records, tmp_path / "all.jsonl", recipe)
    assert len({record["seed"] for record in found}) == 10
    for record in found[::3]:
        row = {"prompt": record["prompt"], "seed": record["seed"]}
        (alone,), _ = run(fake_llm, [row], tmp_path / "one.jsonl", recipe)
        assert (alone["text"], alone["seed"]) == (record["text"], record["seed"])
    again, _ = run(fake_llm, records, tmp_path / "again.jsonl", recipe)
    assert [r["seed"] for r in again] != [r["seed"] for r in found], "no seed means fresh entropy"


def test_a_job_seed_gives_each_row_the_documented_one_of_its_own(
    fake_llm: LLM, tmp_path: Path
) -> None:
    records: list[dict[str, Any] | str] = [{"prompt": "same"}, {"prompt": "same", "seed": 3}]
    records += [{"prompt": "same"}, {"prompt": "same", "top_k": "many"}]
    recipe = recipe_of(fake_llm, temperature=1.0, seed=42)
    found, _ = run(fake_llm, records, tmp_path / "one.jsonl", recipe)
    assert [r["seed"] for r in found] == [row_seed(42, 0), 3, row_seed(42, 2), None]
    assert found[0]["text"] != found[2]["text"]
    again, _ = run(fake_llm, records, tmp_path / "two.jsonl", recipe)
    assert again == found


class EndlessRows(Rows):
    """A slow first row, then quick rows or bad ones for ever; counts what is drawn."""

    def __init__(self, bad: bool, limit: int) -> None:
        self.drawn = 0
        self._bad, self._limit = bad, limit

    def ready(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self.drawn == self._limit:
            raise StopIteration
        index, self.drawn = self.drawn, self.drawn + 1
        if index == 0:
            return Row(0, "slow", {"max_tokens": 200})
        error = RequestError("bad", param="prompt") if self._bad else None
        return Row(index, "quick", {"max_tokens": 1}, error)


@pytest.mark.parametrize("bad", [False, True])
def test_results_that_wait_for_a_slow_row_are_bounded(
    fake_llm: LLM, tmp_path: Path, bad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_runtime.growth.finish_reason", _only_length)
    path = tmp_path / "out.jsonl"
    results = ResultFile(path, force=True)
    job = Job(fake_llm, recipe_of(fake_llm), results)
    waiting: list[int] = []

    def add(self: InOrder, index: int, line: bytes) -> None:
        added(self, index, line)
        waiting.append(self.num_waiting)

    added = InOrder.add
    monkeypatch.setattr(InOrder, "add", add)
    job.run(EndlessRows(bad, limit=1000))
    results.close()
    bound = job_module.WAITING_PER_SLOT * fake_llm.max_batch
    assert bound <= max(waiting) <= bound + 2 * fake_llm.max_batch
    found = [json.loads(line)["index"] for line in path.read_text().splitlines()]
    assert found == list(range(1000))


def _only_length(seq: Any, eos_token_ids: Any) -> str | None:
    return "length" if seq.num_completion_tokens == seq.params.max_tokens else None


def test_a_row_that_has_not_arrived_holds_up_no_other(fake_llm: LLM, tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "out.jsonl", force=True)

    class Interactive(EndlessRows):
        """Sends a row, and the next one only when it has seen the answer."""

        def ready(self) -> bool:
            return self.drawn == results.lines

        def __next__(self) -> Row:
            assert self.ready(), "a job must not wait for a row while others run"
            return super().__next__()

    Job(fake_llm, recipe_of(fake_llm), results).run(Interactive(bad=False, limit=5))
    results.close()
    assert results.lines == 5


def test_a_failing_model_leaves_whole_lines_of_what_was_running(
    fake_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    real = Fake.run

    def fail_later(self: Fake, step: Step) -> Any:
        nonlocal steps
        steps += 1
        if steps > 40:
            raise BackendError("the graph failed")
        return real(self, step)

    monkeypatch.setattr(Fake, "run", fail_later)
    path = tmp_path / "out.jsonl"
    with pytest.raises(BackendError, match="the graph failed"):
        run(fake_llm, mixed_rows(60), path)
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [record["index"] for record in found] == list(range(len(found)))
    assert found[0]["error"] is None
    assert found[-1]["error"] == "the graph failed"


def test_llm_run_asks_again_after_a_none(fake_llm: LLM) -> None:
    params = SamplingParams(max_tokens=3)

    def requests() -> Iterator[Request | None]:
        yield Request("a", params)
        yield None
        yield Request("b", params)
        yield None
        yield None
        yield Request("", params)

    found: dict[int, Completion] = dict(fake_llm.run(requests()))
    assert sorted(found) == [0, 1, 2]
    assert found[2].finish_reason == "error"
