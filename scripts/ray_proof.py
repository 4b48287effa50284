"""See ``scripts/prove_ray``."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.laws.test_ray import NUM_ROWS, expected_lines
from tests.ray_cluster import RayCluster, RayJob, ray_cluster, wait_until
from tests.tiny_model import build_tiny_bundle


class Proof:
    """Jobs with the same rows, on a cluster each.

    Args:
        bundle: what they run.
        folder: where they write.
        seed: of the moments.
    """

    def __init__(self, bundle: Path, folder: Path, seed: int) -> None:
        self._bundle = bundle
        self._folder = folder
        self._random = random.Random(seed)
        prompts = [f"This is row {number}." for number in range(NUM_ROWS)]
        self._prompts = folder / "prompts.txt"
        self._prompts.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        self._expected = expected_lines(bundle, prompts)

    def workers_die(self, cluster: RayCluster, output: Path) -> int:
        """Three workers are killed; how many runs it took."""
        with self._job(cluster, output) as job:
            for _ in range(3):
                self._wait_for_more(job)
                victims = cluster.workers()
                if victims:
                    os.kill(self._random.choice(victims), signal.SIGKILL)
            assert job.ended(180) == ""
        return 1

    def node_is_lost(self, cluster: RayCluster, output: Path) -> int:
        """A node is removed; then the cluster is too small for a run anew, which says so."""
        with self._job(cluster, output) as job:
            self._wait_for_more(job)
            cluster.remove_node()
            assert job.ended(180) == ""
        with self._job(cluster, self._folder / "too-small.jsonl") as job:
            said = job.ended()
            assert "2 workers of 1 processors don't fit" in said, said
        return 1

    def job_dies(self, cluster: RayCluster, output: Path) -> int:
        """The job's own process is killed until it has seen three deaths."""
        for _ in range(3):
            with self._job(cluster, output) as job:
                self._wait_for_more(job)
                job.kill()
        with self._job(cluster, output) as job:
            assert job.ended(180) == ""
        return 4

    def bundle_is_missing(self, cluster: RayCluster, output: Path) -> int:
        """The bundle is away when workers start, and there again for the next run."""
        hidden = self._bundle.with_name("hidden")
        with self._job(cluster, output) as job:
            wait_until(lambda: (output.with_name(f"{output.name}.job") / "shards").exists())
            self._bundle.rename(hidden)
            try:
                said = job.ended()
            finally:
                hidden.rename(self._bundle)
            assert "can't start: there is no bundle at" in said, said
            assert said.count("\n") == 1, said
        with self._job(cluster, output) as job:
            assert job.ended(180) == ""
        return 2

    def check(self, output: Path) -> bool:
        """Whether the lines are those of a run without Ray."""
        return output.read_bytes().splitlines(keepends=True) == self._expected

    def _job(self, cluster: RayCluster, output: Path) -> RayJob:
        return RayJob(cluster, self._bundle, self._prompts, output)

    def _wait_for_more(self, job: RayJob) -> None:
        """Until results come, and then a random while."""
        before = job.rows_done()
        wait_until(lambda: job.rows_done() > before)
        time.sleep(self._random.uniform(0, 0.5))


def main() -> None:
    """Run all kinds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    are_right = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        proof = Proof(options.bundle or build_tiny_bundle(folder), folder, options.seed)
        kinds: list[Callable[[RayCluster, Path], int]] = [
            proof.workers_die,
            proof.node_is_lost,
            proof.job_dies,
        ]
        if options.bundle is None:  # ours, which may be moved
            kinds.append(proof.bundle_is_missing)
        for number in range(options.rounds):
            for kind in kinds:
                output = folder / f"{kind.__name__}-{number}.jsonl"
                began = time.monotonic()
                with ray_cluster() as cluster:
                    runs = kind(cluster, output)
                right = proof.check(output)
                are_right = are_right and right
                seconds = time.monotonic() - began
                found.setdefault(kind.__name__, []).append(round(seconds, 1))
                verdict = "the same lines" if right else "OTHER LINES"
                print(f"{kind.__name__}: {runs} runs, {seconds:.0f} s, {verdict}", flush=True)
    print(json.dumps({"right": are_right, "rows": NUM_ROWS, "seconds": found}))
    sys.exit(not are_right)


if __name__ == "__main__":
    main()
