"""Caravan runs on a processor without AVX-512 and computes what numpy computes.

A short slice of ``scripts/prove_old_cpu``, whose cases, worker and judgement these are.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.old_cpu.cases import write_cases
from tests.old_cpu.proof import MISSING, complaints, emulator, run_batch, run_worker

PROCESSOR = "Haswell"

pytestmark = pytest.mark.skipif(emulator() is None, reason=MISSING)


@pytest.fixture(scope="module")
def cases(tiny_model: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cases")
    write_cases(folder, tiny_model, tiny_bundle, thorough=False)
    return folder


@pytest.fixture(scope="module")
def workers(cases: Path) -> list[dict[str, Any]]:
    """What was found with one thread and with two, side by side: emulation is slow."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda threads: run_worker(cases, PROCESSOR, threads), (1, 2)))


@pytest.fixture
def figures(workers: list[dict[str, Any]]) -> dict[str, Any]:
    return workers[0]


def test_products_and_the_engine_are_numpys_and_company_changes_nothing(
    figures: dict[str, Any],
) -> None:
    assert complaints(figures, PROCESSOR) == []
    assert figures["products"]["products"] >= 150
    assert figures["bytes"]["numbers"] >= 10_000
    assert figures["runtime"]["tokens"] >= 50
    assert figures["company"]["rows"] >= 100


def test_two_threads_do_the_same(workers: list[dict[str, Any]]) -> None:
    assert [figures["threads"] for figures in workers] == [1, 2]
    assert complaints(workers[1], PROCESSOR) == []


def test_llama_run_batch_gives_the_tokens_of_numpy(cases: Path) -> None:
    right = json.loads((cases / "completions.json").read_text())
    assert run_batch(cases, PROCESSOR) == right


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("products", "max_error", 4.1),
        ("bytes", "wrong", 1),
        ("products", "other_bits", 1),
        ("runtime", "max_logit_difference", 2e-4),
        ("runtime", "max_logit_difference", float("nan")),
        ("runtime", "equal_tokens", 0),
        ("company", "other_bits", 1),
        ("unpacked_company", "other_bits", 1),
        ("unpacked_company", "row_multiple", 1),
        (None, "features", ["AVX", "FMA3", "AVX2", "AVX512F"]),
        (None, "features", ["AVX"]),
        (None, "torch_free", False),
    ],
)
def test_the_judgement_sees(
    figures: dict[str, Any], part: str | None, key: str, value: object
) -> None:
    wrong = deepcopy(figures)
    (wrong if part is None else wrong[part])[key] = value
    assert len(complaints(wrong, PROCESSOR)) == 1


def test_a_worker_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"tests\.old_cpu\.worker on Haswell ended with 1: "):
        run_worker(tmp_path, PROCESSOR, threads=1)
