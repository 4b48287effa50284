"""A slice of scripts/prove_resume: however a job's runs end, its results are those of one run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("signals of POSIX", allow_module_level=True)

from scripts.resume_proof import FORMS, Proof
from tests.runtime.conftest import FAKE_LLAMA_RUN, write_fake_bundle

STEP_SECONDS = "0.002"


@pytest.mark.parametrize(("form", "kills"), list(zip(FORMS, (4, 3, 3), strict=True)))
def test_a_job_that_is_ended_anywhere_goes_on_to_the_same_results(
    tmp_path: Path, form: str, kills: int
) -> None:
    script = tmp_path / "fake_llama_run.py"
    script.write_text(FAKE_LLAMA_RUN)
    bundle = write_fake_bundle(tmp_path / "bundle")
    start = [sys.executable, str(script), STEP_SECONDS]
    proof = Proof(start, bundle, tmp_path, seed=1, num_rows=120)
    terms = int(form == "ordered")
    proof.prove(form, kills=kills, terms=terms, small_disk=form == "openai")
    assert not proof.bad
    assert proof.figures[f"{form} SIGKILL"] == kills
    assert proof.figures[f"{form} SIGTERM"] == terms
