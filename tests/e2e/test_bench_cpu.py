"""The benchmark measures what it says, on a model that takes seconds; figures are not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.bench_batching import ways
from scripts.bench_decode import compared

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.bench_cpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tiny_bundle: Path) -> dict[str, Any]:
    run = bench(str(tiny_bundle), "--rounds", "1", "--threads", "1")
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def test_the_last_line_says_where_and_with_what(results: dict[str, Any]) -> None:
    assert results["machine"]["cpu"]
    assert results["versions"].keys() >= {"caravan", "python", "onnxruntime", "numpy"}
    assert (results["threads"], results["rounds"]) == (1, 1)


def test_every_figure_is_there(results: dict[str, Any]) -> None:
    assert results["around"]["steps"] >= 190  # 199 decode steps, some beside the last prompts
    assert 0 < results["around"]["ms_per_step"] < 1000
    for batch in ("1", "8", "32"):
        assert results["decode"][batch]["caravan_tokens_per_s"] > 0
        assert results["decode"]["limit"][f"tokens_per_s_{batch}"] > 0
    assert results["mixed"]["continuous_s"] > 0
    assert results["mixed"]["padded_s"] > results["mixed"]["fixed_s"]
    assert 0 < results["start"]["import_s"] < 60


def test_the_three_ways_run_what_their_names_say() -> None:
    three = ways()
    wanted = three["continuous"].lengths
    assert len(wanted) == 256
    assert {min(min(pair) for pair in wanted), max(max(pair) for pair in wanted)} <= {
        *range(16, 257)
    }
    assert three["fixed"].lengths == wanted
    assert [way.refill for way in three.values()] == [True, False, False]
    for i, (prompt, new) in enumerate(three["padded"].lengths):
        group = wanted[i // 32 * 32 : i // 32 * 32 + 32]
        assert (prompt, new) == (max(p for p, _ in group), max(n for _, n in group))


def test_a_ratio_is_the_median_of_rounds_run_in_turns() -> None:
    def answer(decode: float, tokens: list[list[int]]) -> dict[str, Any]:
        return {"decode_s": decode, "prefill_s": 1.0, "token_ids": tokens}

    ours = [answer(s, [[1], [2]]) for s in (1.0, 2.0, 4.0)]
    peers = [answer(s, [[1], [3]]) for s in (3.0, 4.0, 4.0)]
    result = compared({"caravan": ours, "genai": peers}, batch=2, asked=1.5)
    assert result["ratio"] == 2.0
    assert (result["ratio_low"], result["ratio_high"]) == (1.0, 3.0)
    assert result["caravan_tokens_per_s"] == 2 * 63 / 2.0
    assert result["rows_with_the_same_tokens"] == 1


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--only", "nonsense"], []])
def test_wrong_use_is_said(wrong: list[str], tiny_bundle: Path) -> None:
    run = bench(*([str(tiny_bundle)] if wrong else []), *wrong)
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
