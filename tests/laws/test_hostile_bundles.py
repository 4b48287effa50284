"""Each of many bundles made to do harm is one sentence, quickly and in little memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("limits and special files of POSIX", allow_module_level=True)

from tests.hostile.bundles import HOSTILE
from tests.hostile.measured import measured
from tests.hostile.proof import LIMIT_BYTES, give_to_llama_run

pytestmark = pytest.mark.alone  # each has a limit of time

Results = dict[str, Future[tuple[str, float, int]]]


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Results]:
    """All that this session asks for, run side by side."""
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {spec.params.get("name") for spec in specs if spec is not None}
    place = tmp_path_factory.mktemp("hostile")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(give_to_llama_run, tiny_bundle, name, place / str(number))
            for number, name in enumerate(HOSTILE)
            if name in asked
        }


def test_there_are_many() -> None:
    assert len(HOSTILE) > 100


def test_the_bundle_they_are_made_from_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    options = ["--max-tokens", "4", "--bundle", str(tiny_bundle)]
    run = measured([sys.executable, "-m", "llama_runtime", "generate", "hello", *options])
    assert (run.status, run.said) == (0, "")
    assert run.peak_bytes < LIMIT_BYTES


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_is_one_sentence(
    name: str, results: Results, tiny_bundle: Path, tmp_path: Path
) -> None:
    problem, seconds, _ = results[name].result()
    if problem.startswith(f"{seconds:.2f} s"):  # others ran beside it
        problem, _, _ = give_to_llama_run(tiny_bundle, name, tmp_path / "again")
    assert not problem
