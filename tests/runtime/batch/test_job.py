"""Batch jobs: one whole line a row, in order, whatever the rows are and whatever ends first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.completion import Completion, Request
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams, row_seed
from tests.runtime.batch.jobs import Given, mixed_rows, recipe_of, results_in, run_job


def run(
    llm: LLM, rows: list[Given], path: Path, recipe: Recipe | None = None
) -> tuple[list[dict[str, Any]], Statistics]:
    """The results of a job, read back from its file."""
    path.unlink(missing_ok=True)
    statistics = run_job(llm, rows, path, recipe)
    return results_in(path), statistics


def test_results_come_in_the_order_of_the_rows_whatever_ends_first(
    fake_llm: LLM, tmp_path: Path
) -> None:
    ended: list[int] = []
    path = tmp_path / "out.jsonl"
    statistics = run_job(
        fake_llm, mixed_rows(40), path, ended=lambda outcome: ended.append(outcome.index)
    )
    found = results_in(path)
    assert [record["index"] for record in found] == list(range(40))
    assert [record["prompt"] for record in found] == [
        row["prompt"] for row in mixed_rows(40) if isinstance(row, dict)
    ]
    assert ended != sorted(ended), "the rows were meant to end out of order"
    assert {record["finish_reason"] for record in found} == {"stop", "length"}
    assert statistics.completion_tokens == sum(len(record["token_ids"]) for record in found)


def test_without_an_order_results_come_as_rows_end(fake_llm: LLM, tmp_path: Path) -> None:
    ended: list[int] = []
    path, ordered = tmp_path / "out.jsonl", tmp_path / "ordered.jsonl"
    run_job(
        *(fake_llm, mixed_rows(40), path),
        ordered=False,
        ended=lambda outcome: ended.append(outcome.index),
    )
    run_job(fake_llm, mixed_rows(40), ordered)
    assert [record["index"] for record in results_in(path)] == ended
    assert sorted(path.read_bytes().splitlines()) == sorted(ordered.read_bytes().splitlines())


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


BAD_ROWS: list[Given] = [
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
    found, statistics = run(fake_llm, mixed, tmp_path / "mixed.jsonl")
    assert [record["index"] for record in found] == list(range(len(mixed)))
    for before, after in zip(expected, found[::2], strict=True):
        assert after["error"] is None
        assert after["text"] == before["text"]
    for record in found[1::2]:
        assert record["finish_reason"] == "error"
        assert record["error"]
        assert "\n" not in record["error"]
        assert (record["text"], record["token_ids"]) == ("", [])
    assert statistics.failed == len(BAD_ROWS)
    assert statistics.first_error == (1, found[1]["error"])


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
    records: list[Given] = [{"prompt": f"tell {i}"} for i in range(10)]
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
    records: list[Given] = [{"prompt": "same"}, {"prompt": "same", "seed": 3}]
    records += [{"prompt": "same"}, {"prompt": "same", "top_k": "many"}]
    recipe = recipe_of(fake_llm, temperature=1.0, seed=42)
    found, _ = run(fake_llm, records, tmp_path / "one.jsonl", recipe)
    assert [r["seed"] for r in found] == [row_seed(42, 0), 3, row_seed(42, 2), None]
    assert found[0]["text"] != found[2]["text"]
    again, _ = run(fake_llm, records, tmp_path / "two.jsonl", recipe)
    assert again == found


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
