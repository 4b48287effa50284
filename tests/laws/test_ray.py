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

NUM_ROWS = 200


def expected_lines(bundle: Path, prompts: list[str]) -> list[bytes]:
    """What a run in this process gives."""
    llm, form = replace(spec_of(bundle), max_batch=16).load()
    records = (Record(i, Line(i + 1, prompt)) for i, prompt in enumerate(prompts))
    outcomes: list[Outcome] = []
    with llm:
        LocalRunner(llm, form).run(records, lambda: True, outcomes.append)
    return [each.line for each in sorted(outcomes, key=lambda outcome: outcome.index)]


def test_whatever_dies_each_row_has_one_result(tiny_bundle: Path, tmp_path: Path) -> None:
    """The job itself dies; the same command goes on, a worker dies under it, and a node is lost."""
    prompts = [f"This is row {number}." for number in range(NUM_ROWS)]
    files = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    files[0].write_text("\n".join(prompts) + "\n", encoding="utf-8")
    with ray_cluster() as cluster:
        with RayJob(cluster, tiny_bundle, *files, num_workers=1) as job:
            wait_until(lambda: job.rows_done() > 0)
            job.kill()
        after_first = job.rows_done()
        assert 0 < after_first < NUM_ROWS
        with RayJob(cluster, tiny_bundle, *files) as job:
            wait_until(lambda: job.rows_done() > after_first)
            os.kill(cluster.workers()[0], signal.SIGKILL)
            at_death = job.rows_done()
            wait_until(lambda: job.rows_done() > at_death + 32)
            assert job.rows_done() < NUM_ROWS
            cluster.remove_node()
            assert job.ended() == ""
    found = files[1].read_bytes().splitlines(keepends=True)
    assert found == expected_lines(tiny_bundle, prompts)
    assert not (tmp_path / "out.jsonl.job" / "shards").exists()
