"""What several processes share is made once, and the parts of ``scripts/test`` are all tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.shared import Shared

ROOT = Path(__file__).parents[2]


def test_a_folder_is_made_once_however_many_ask(tmp_path: Path) -> None:
    calls = []

    def make(path: Path) -> None:
        calls.append(path)
        path.mkdir()
        time.sleep(0.05)
        (path / "whole").touch()

    def ask(_: int) -> bool:
        return (Shared(tmp_path)("a", make) / "whole").exists()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
    assert calls == [tmp_path / "a"]
    assert Shared(tmp_path)("b", make) == tmp_path / "b"
    assert len(calls) == 2


def test_a_folder_that_could_not_be_made_is_made_anew(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise ZeroDivisionError

    shared = Shared(tmp_path)
    with pytest.raises(ZeroDivisionError):
        shared("a", fail)
    assert list(shared("a", Path.mkdir).iterdir()) == []


def collected(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return [line for line in run.stdout.splitlines() if "::" in line]


def test_the_two_parts_are_all_the_tests() -> None:
    file = "tests/laws/test_sampling_laws.py"
    alone, others = collected("-m", "alone", "tests/laws"), collected("-m", "not alone", file)
    assert {line.partition("::")[0] for line in alone} > {file}
    alone = [line for line in alone if line.startswith(file)]
    assert len(alone) == 4
    assert others
    assert sorted(alone + others) == sorted(collected(file))


def test_one_that_no_part_would_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import pytest\n"
        "from tests.conftest import pytest_collection_modifyitems\n"
        "def pytest_configure(config): config.addinivalue_line('markers', 'alone')\n"
        "pytest.slow = pytest.mark.alone\n"
    )
    (tmp_path / "test_a.py").write_text("import pytest\n@pytest.slow\ndef test_a(): pass\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        collected("-m", "not alone", "--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path))
    assert "nobody runs these tests" in failed.value.stderr + failed.value.stdout
