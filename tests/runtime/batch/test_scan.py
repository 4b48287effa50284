"""The first look at all rows: it counts, measures, and finds names that come twice."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from llama_runtime.batch.forms.formats import Format, Record
from llama_runtime.batch.forms.prompt_format import PromptFormat
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.rows import scan as scan_module
from llama_runtime.batch.rows.lines import Line
from llama_runtime.batch.rows.scan import Scan
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import CaravanError, RequestError
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from tests.runtime.batch.jobs import NO_RECIPE, OPENAI, PROMPTS, Given, jsonl, records_of


def names_of(tmp_path: Path, rows: list[Given], form: Format = PROMPTS) -> Scan:
    scan = Scan()
    try:
        scan.read(records_of(jsonl(rows)), form, tmp_path / "ids", measure=False)
    finally:
        assert not (tmp_path / "ids").exists(), "the index is removed"
    return scan


def test_a_scan_finds_the_longest_row_that_the_model_can_take(
    fake_bundle: Path, tmp_path: Path
) -> None:
    encoder = PromptEncoder(open_bundle(fake_bundle))
    recipe = Recipe.of_job(encoder, SamplingParams(max_tokens=24), {}, False)
    form = PromptFormat(recipe, is_object=True)
    rows: list[Given] = [{"prompt": "x" * 50}, {"prompt": "x" * 300}]
    rows += [{"prompt": "y", "max_tokens": 100}, {"prompt": "z" * 600}]
    rows += ["{broken", {"prompt": "x" * 400, "top_p": 3}]
    for given, expected in ((rows, 324), (["{", "["], 2)):
        scan = Scan()
        scan.read(records_of(jsonl(given)), form, tmp_path / "ids", measure=True)
        assert scan.to_dict() == {"rows": len(given), "longest": expected}
        assert Scan(**scan.to_dict()).to_dict() == scan.to_dict()
    assert names_of(tmp_path, rows).to_dict() == {"rows": 6, "longest": None}


@pytest.mark.parametrize("at_once", [1, 3, 20_000])
def test_names_that_come_twice_are_refused_with_their_rows(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "_ROWS_AT_ONCE", at_once)
    for form, key in ((PROMPTS, "id"), (OPENAI, "custom_id")):
        rows: list[Given] = [{key: f"n{i}", "prompt": "a"} for i in range(9)]
        assert names_of(tmp_path, rows, form).rows == 9
        quote = '"' if form is PROMPTS else ""
        shown = f"{quote}n4{quote} of rows 4 and 9"
        with pytest.raises(RequestError) as caught:
            names_of(tmp_path, [*rows, rows[4]], form)
        assert str(caught.value) == (
            f"1 row has the id of another one: {shown}. Give each row an id of its own"
        )
        with pytest.raises(RequestError, match=r"^6 rows have .* of rows .*; and 3 more\. Give"):
            names_of(tmp_path, [*rows[:3], *rows[:3], *rows[:3]], form)


def test_names_that_only_look_alike_and_rows_without_any_are_no_repetition(tmp_path: Path) -> None:
    rows: list[Given] = [{"id": value, "prompt": "a"} for value in (1, "1", "a", "A", "a ", "é")]
    rows += [{"prompt": "a"}, {"prompt": "a"}, "{broken", "{broken", {"id": None, "prompt": "a"}]
    rows += [{"id": "", "prompt": "a"}, {"id": "", "prompt": "a"}]  # an error of each
    assert names_of(tmp_path, rows).rows == len(rows)


def test_a_row_that_can_not_run_has_a_name_too(tmp_path: Path) -> None:
    rows: list[Given] = [{"id": 7, "nonsense": 1}, {"id": 7, "prompt": "a"}]
    with pytest.raises(RequestError, match="7 of rows 0 and 1"):
        names_of(tmp_path, rows)


def test_a_hundred_thousand_names_take_little_memory(tmp_path: Path) -> None:
    class Named(PromptFormat):
        def id_of(self, record: Record) -> str | None:
            return record.line.text

    count = 100_000
    records = (Record(i, Line(i, f"name {i * 7919 % count}")) for i in range(count))
    scan, form = Scan(), Named(NO_RECIPE, is_object=True)
    tracemalloc.start()
    scan.read(records, form, tmp_path / "ids", measure=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert scan.rows == count
    assert peak < 5 * 2**20, "held in a list, they would take 16 MB"


def test_an_index_that_can_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CaravanError, match=r"^can't write to .*ids: unable to open database file$"):
        Scan().read(records_of(b"a\n"), PROMPTS, tmp_path / "no" / "ids", measure=False)
