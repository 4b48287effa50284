"""A slice of scripts/prove_hostile_files: damaged checkpoints are finite weights or one error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COUNT = 160


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_damaged_checkpoints_do_no_harm() -> None:
    run = subprocess.run(
        [ROOT / "scripts" / "prove_hostile_files", "--count", str(COUNT), "--no-bundles"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["passed"]
    assert figures["mutants"] == COUNT
    assert figures["refused"] > COUNT / 2
    assert figures["loaded"] > COUNT / 10, "some damage must be deeper than the first check"
