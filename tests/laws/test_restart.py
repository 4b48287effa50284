"""A slice of scripts/prove_restart: a server that is killed is there again, and misleads nobody."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("signals of POSIX", allow_module_level=True)

from scripts.restart_proof import RestartProof
from tests.runtime.conftest import FAKE_LLAMA_RUN, write_fake_bundle

STEP_SECONDS = "0.02"


def test_a_server_that_is_killed_under_load_is_there_again(tmp_path: Path) -> None:
    script = tmp_path / "fake_llama_run.py"
    script.write_text(FAKE_LLAMA_RUN)
    bundle = write_fake_bundle(tmp_path / "bundle")
    start = [sys.executable, str(script), STEP_SECONDS]
    proof = RestartProof(start, bundle, tmp_path / "said", limit=20.0)
    proof.kill(40)
    proof.kill(0)
    proof.end_while_loading(1, random.Random(0))
    assert not proof.bad
    assert (proof.num_cut, proof.num_ended, len(proof.starts)) == (40, 1, 2)
