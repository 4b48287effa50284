"""On Ray each row has one result, whatever dies: a worker, a node, the process of the job.

``scripts/prove_ray`` does the same with random moments and more of them.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.rows.lines import Line
from llama_runtime.batch.runners.runner import LocalRunner
from tests.ray_cluster import RayJob, ray_cluster, wait_until
from tests.ray_job import spec_of

NUM_ROWS = 400


def expected_lines(bundle: Path, prompts: list[str]) -> list[bytes]:
    """What a run in this process gives."""
    llm, form = replace(spec_of(bundle), max_batch=16).load()
    records = (Record(i, Line(i + 1, prompt)) for i, prompt in enumerate(prompts))
    outcomes: list[Outcome] = []
    with llm:
        LocalRunner(llm, form).run(records, lambda: True, outcomes.append)
    return [each.line for each in sorted(outcomes, key=lambda outcome: outcome.index)]


def test_whatever_dies_each_row_has_one_result(tiny_bundle: Path, tmp_path: Path) -> None:
    """A worker dies, then the job itself; the same command goes on, and a node is lost."""
    prompts = [f"This is row {number}." for number in range(NUM_ROWS)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    with ray_cluster() as cluster:
        with RayJob(cluster, tiny_bundle, tmp_path / "prompts.txt", tmp_path / "out.jsonl") as job:
            wait_until(lambda: job.rows_done() > 0)
            victim = cluster.workers()[0]
            os.kill(victim, signal.SIGKILL)
            at_death = job.rows_done()
            wait_until(lambda: job.rows_done() > at_death + 64)
            job.kill()
        after_first = job.rows_done()
        assert 0 < after_first < NUM_ROWS
        with RayJob(cluster, tiny_bundle, tmp_path / "prompts.txt", tmp_path / "out.jsonl") as job:
            wait_until(lambda: job.rows_done() > after_first)
            assert job.rows_done() < NUM_ROWS
            cluster.remove_node()
            assert job.ended() == ""
    found = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    assert found == expected_lines(tiny_bundle, prompts)
    assert not (tmp_path / "out.jsonl.job" / "shards").exists()
