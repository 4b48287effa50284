"""``llama-run bench`` on a bundle: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from llama_runtime.bench import limits, local
from llama_runtime.bench.charts import charts
from llama_runtime.bench.png import as_png
from llama_runtime.bench.report import drawings, render
from llama_runtime.bench.strategies import Run, run_strategy
from llama_runtime.bench.table import as_text
from llama_runtime.cli import cli
from tests.runtime.batch.test_html_report import Page
from tests.runtime.bench.test_figures import VLLM

Bench = Callable[..., Result]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def bench(fake_backend: None, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs ``llama-run bench`` on the fake bundle, in this process."""
    monkeypatch.setenv("LLAMA_RUN_BUNDLE", os.fspath(fake_bundle))
    monkeypatch.setattr(limits, "READ_BYTES", 2**20)
    monkeypatch.setattr(limits, "SHAPES", ((2, 8, 16),))

    def bench(*args: object) -> Result:
        line = ["bench", "--num-prompts", "6", "--rounds", "1", "--batch-sizes", "1,2,4"]
        return CliRunner().invoke(cli, [*line, *map(str, args)], prog_name="llama-run")

    return bench


@pytest.fixture
def record(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bench("--json", "-").stdout)
    return found


def test_strategies_stand_side_by_side_in_80_columns(bench: Bench) -> None:
    result = bench()
    assert (result.exit_code, result.stderr) == (0, "")  # no terminal, so nothing but the table
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    names = [line.split()[0] for line in lines[3:9]]
    assert names == ["sequential", *["static", "continuous"], "concurrent", "static", "continuous"]
    assert "All runs gave the same tokens." in result.stdout


def test_the_json_has_vllms_names_and_adds_up(record: dict[str, Any]) -> None:
    assert [(run["strategy"], run["batch_size"]) for run in record["runs"]] == [
        ("sequential", 1),
        *[("static", 2), ("continuous", 2)],
        *[("concurrent", 4), ("static", 4), ("continuous", 4)],
    ]
    for run in record["runs"]:
        assert set(run) >= VLLM | {"max_concurrency", "request_rate", "num_prompts", "model_id"}
        assert (run["completed"], run["failed"]) == (6, 0)
        both = run["request_throughput"] * run["duration"], run["completed"]
        assert both[0] == pytest.approx(both[1])
        assert run["output_throughput"] * run["duration"] == pytest.approx(
            run["total_output_tokens"]
        )
        assert run["bandwidth_share"] > 0
        assert run["compute_share"] > 0
        assert run["peak_memory_bytes"] > 2**20
        assert max(held for _, held in run["occupancy"]) <= run["batch_size"]
        assert run["occupancy"][-1][0] <= run["duration"]
    assert len({run["total_output_tokens"] for run in record["runs"]}) == 1


def test_lengths_are_swept_each_with_a_table_of_its_own(bench: Bench) -> None:
    result = bench("--input-len", "3,5:9", "--output-len", "2,4", "--strategies", "continuous")
    heads = re.findall(r"^6 requests, (.*)$", result.stdout, re.MULTILINE)
    assert heads == [f"{i} tokens in, {o} out" for i in ("3", "5:9") for o in ("2", "4")]


def test_files_hold_what_the_table_says(bench: Bench, tmp_path: Path) -> None:
    names = {"--json": "a.json", "--csv": "a.csv", "--report": "a.html", "--plots": "plots"}
    args = [part for name, file in names.items() for part in (name, tmp_path / file)]
    result = bench(*args)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "a.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))
    assert [row["strategy"] for row in rows] == [run["strategy"] for run in record["runs"]]
    for row, run in zip(rows, record["runs"], strict=True):
        assert float(row["output_throughput"]) == run["output_throughput"]
    assert as_text(record) == result.stdout
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    names_of = ("latency", "occupancy", "throughput")
    assert plots == [f"{name}.{kind}" for name in names_of for kind in ("png", "svg")]
    assert (tmp_path / "a.html").read_text() == render(record)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_the_page_is_whole_by_itself_and_has_every_run(record: dict[str, Any]) -> None:
    record["model"] = "<script>&"
    source = render(record)
    page = Page(source)
    assert not {"script", "link", "img", "iframe"} & set(page.elements)
    assert not {"src", "href", "onclick"} & page.attributes
    assert "http" not in re.sub(r"https?://www\.w3\.org/\S+", "", source)
    for run in record["runs"]:
        label = f"{run['strategy']}, batch {run['batch_size']}"
        rows = [row for row in page.rows if row and row[0] == label]
        assert len(rows) == 5  # rates, and four latencies
    assert source.count("<figure>") == 3
    assert "prefers-color-scheme: dark" in source


def test_each_chart_is_a_file_of_svg_with_its_points_inside(record: dict[str, Any]) -> None:
    found = drawings(record)
    assert list(found) == ["throughput.svg", "latency.svg", "occupancy.svg"]
    for source in found.values():
        root = ElementTree.fromstring(source)
        assert root.tag == f"{SVG}svg"
        assert "prefers-color-scheme: dark" in source
        width = float(root.attrib["width"])
        height = float(root.attrib["height"])
        assert width > 0
        for circle in root.iter(f"{SVG}circle"):
            assert 0 <= float(circle.attrib["cx"].rstrip("%")) <= 100
            assert 0 <= float(circle.attrib["cy"]) <= height
    points = ElementTree.fromstring(found["throughput.svg"]).iter(f"{SVG}circle")
    assert len(list(points)) == 2 * 3 + 2  # two curves from one at a time on, and two points


def test_a_chart_as_png_is_twice_as_large_and_not_empty(record: dict[str, Any]) -> None:
    for svg in drawings(record).values():
        png = as_png(svg)
        assert png is not None
        assert png.startswith(b"\x89PNG")
        root = ElementTree.fromstring(svg)
        size = [int.from_bytes(png[i : i + 4]) for i in (16, 20)]
        assert size == [2 * int(root.attrib[name]) for name in ("width", "height")]
        assert len(set(zlib.decompress(png[png.index(b"IDAT") + 4 :]))) > 20  # many colours


def test_without_the_library_there_is_no_png(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert as_png(drawings(record)["latency.svg"]) is None


def test_the_knee_is_marked_at_the_least_size_close_to_the_best(record: dict[str, Any]) -> None:
    rates = {("continuous", 2): 95.0, ("continuous", 4): 100.0}
    for run in record["runs"]:
        run["output_throughput"] = rates.get((run["strategy"], run["batch_size"]), 10.0)
    throughput = charts(record["runs"])[0]
    assert [at for at, _ in throughput.marks] == [2]
    assert "continuous: 90 % of its best with 2 at once" in as_text(record)


def test_tokens_that_differ_are_said_to(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(strategy: str, *args: Any) -> Run:
        run = run_strategy(strategy, *args)
        if strategy == "static":
            run.token_ids[0] = [*run.token_ids[0][::-1], 0]
        return run

    monkeypatch.setattr(local, "run_strategy", spoiled)
    result = bench()
    said = " ".join(result.stdout.split())
    assert "Not all runs gave the same tokens as the first." in said
    assert "Completions of 6 that differ: static 2: 1, static 4: 1." in said


def test_the_round_in_the_middle_counts(bench: Bench) -> None:
    result = bench("--rounds", 3, "--strategies", "continuous", "--batch-sizes", 4, "--json", "-")
    (run,) = json.loads(result.stdout)["runs"]
    assert len(run["durations"]) == 3
    assert run["duration"] == sorted(run["durations"])[1]


def test_talks_of_a_file_are_asked(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    talks = [
        {"conversations": [{"from": "human", "value": "x" * n}, {"from": "gpt", "value": "y" * 5}]}
        for n in range(4, 14)
    ]
    path.write_text(json.dumps(talks))
    result = bench("--dataset-path", path, "--strategies", "static", "--json", "-")
    assert result.exit_code == 0, result.output
    for run in json.loads(result.stdout)["runs"]:
        assert run["total_output_tokens"] == 6 * 5  # a byte is a token here
        assert run["input_len"] == "sharegpt"


WRONG: dict[str, tuple[list[object], str]] = {
    "strategy": (["--strategies", "fast"], "'fast' is none of sequential, concurrent"),
    "batch size": (["--batch-sizes", "1,0"], "'0' is no whole number in 1 to 1,024"),
    "batch sizes": (["--batch-sizes", ""], "'' is no whole number"),
    "lengths": (["--input-len", "9:3"], "'9:3' doesn't rise"),
    "no lengths": (["--output-len", "many"], "'many' is no whole number"),
    "too long": (["--input-len", "600"], "over the model's limit 512"),
    "rate": (["--request-rate", "0", "--serve", "http://a"], "must be a number above 0"),
    "rate nan": (["--request-rate", "nan", "--serve", "http://a"], "must be a number above 0"),
    "at once": (["--max-concurrency", "0", "--serve", "http://a"], "'0' is no whole number"),
    "serve alone": (["--endpoint", "chat"], "--endpoint needs --serve"),
    "bundle beside": (["--serve", "http://a", "--bundle", "b"], "--bundle can't be given with"),
    "batch beside": (["--serve", "http://a"], "--batch-sizes can't be given with --serve"),
    "no data": (["--dataset-name", "sharegpt"], "give both or none"),
    "other data": (["--dataset-name", "synthetic", "--dataset-path", "a"], "give both or none"),
    "two lengths": (["--dataset-path", "a", "--input-len", "3"], "whose prompts have their own"),
    "no file": (["--dataset-path", "no.json"], "no.json can't be read"),
    "no folder": (["--json", "nowhere/a.json"], "the folder nowhere does not exist"),
    "one file": (["--json", "a", "--csv", "a"], "must be different files"),
    "devices": (["--devices", "0"], "was built for the CPU"),
    "threads": (["--threads", "0"], "--threads"),
}


@pytest.mark.parametrize("use", WRONG)
def test_wrong_use_is_one_sentence_and_status_2(bench: Bench, use: str) -> None:
    args, words = WRONG[use]
    result = bench(*args)
    assert result.exit_code == 2, result.output
    assert words in result.stderr.splitlines()[-1]
    assert result.stdout == ""


def test_a_size_that_does_not_fit_into_memory_is_refused(bench: Bench) -> None:
    result = bench("--bundle", "nowhere")
    assert (result.exit_code, "nowhere does not exist" in result.stderr) == (2, True)


def test_help_fits_80_columns_and_imports_nothing_heavy(bench: Bench) -> None:
    result = bench("--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("Example", "vLLM", "TTFT", "--serve", "Exit status"):
        assert words in result.stdout
