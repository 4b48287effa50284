"""Slices of scripts/prove_serving and prove_soak: a server under load, over no model."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)

from scripts.serving_drain import Open
from scripts.serving_leavers import Crowd
from scripts.serving_overload import Size
from scripts.serving_process import running
from scripts.serving_proof import Proof
from scripts.serving_uses import Uses
from scripts.soak_serving import KEY, MAX_LEN, OPTIONS
from tests.runtime.conftest import FAKE_LLAMA_RUN, write_fake_bundle

pytestmark = pytest.mark.alone  # takes times, and memory while others take theirs

STEP_SECONDS = "0.002"


@pytest.fixture
def proof(tmp_path: Path) -> Proof:
    script = tmp_path / "fake_llama_run.py"
    script.write_text(FAKE_LLAMA_RUN)
    bundle = write_fake_bundle(tmp_path / "bundle", eos_token_id=257)
    return Proof([sys.executable, str(script), STEP_SECONDS], bundle, tmp_path, seed=1)


def test_ten_times_too_many_are_refused_and_the_others_served(proof: Proof) -> None:
    proof.overload(Size(slots=4, queue=8, max_len=256, seconds=1.6, warm_up=0.6))
    assert not proof.findings.bad
    assert proof.findings.figures["overload"]["refused"] > 50


def test_nothing_stays_of_those_who_leave(proof: Proof) -> None:
    proof.leavers(Crowd(clients=80, spread=0.5, slots=4, max_len=256))
    assert not proof.findings.bad
    assert sum(proof.findings.figures["leavers"]["left"].values()) > 40


def test_a_server_that_is_told_to_end_cuts_nobody_off_in_time(proof: Proof) -> None:
    proof.drain(Open(streams=40, slots=32, tokens=60, hurry=0.2))
    assert not proof.findings.bad
    assert proof.findings.figures["drain_hurried"]["cut_off"] >= 8


def test_every_use_of_a_soak_gets_the_answer_it_should(proof: Proof) -> None:
    found = proof.findings
    options = (*OPTIONS, "--max-queued-requests", "100")
    with running(proof.start, proof.bundle, proof.folder, *options, key=KEY) as server:
        uses = Uses(server, MAX_LEN, 1, found)
        asyncio.run(uses.do_all(5))
        assert not server.complaints()
    assert not found.bad
    assert set(uses.statuses) == {200, 400, 401, 404, 405, 413, 431}
