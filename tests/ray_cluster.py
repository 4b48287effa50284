"""A Ray cluster of simulated nodes, in a process of its own: ``python -m tests.ray_cluster``.

It writes a line of JSON, ``{"address": ..., "raylets": [PID, ...]}``, the head node's first. A line
``remove`` to its standard input removes the last node, which it says with a line; the end of its
standard input ends the cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CPUS = (1, 1)  # of the nodes; the first one stays
# A head node without the processes that show it, forward its logs and start more nodes.
SMALL = {
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
    "object_store_memory": 2**27,
}


def main() -> None:
    """Run a cluster until nobody wants it any more."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS[0], **SMALL})
    added = [cluster.add_node(num_cpus=cpus, object_store_memory=2**27) for cpus in CPUS[1:]]
    nodes: list[Any] = [cluster.head_node, *added]
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    sys.stdout.write(json.dumps({"address": cluster.address, "raylets": raylets}) + "\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        sys.stdout.write("removed\n")
        sys.stdout.flush()
    cluster.shutdown()


class RayCluster:
    """The other side of ``main``.

    Args:
        process: that runs it.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout is not None
        about = json.loads(process.stdout.readline())
        self.address: str = about["address"]
        self.raylets: list[int] = about["raylets"]

    def workers(self) -> list[int]:
        """The processes that run rows."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                title = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if title.startswith(b"ray::MapWorker") and parent in self.raylets:
                    found.append(int(entry.name))
        return found

    def remove_node(self) -> None:
        """Take a node away, with all that runs on it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("remove\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "removed\n"
        self.raylets.pop()


@contextlib.contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster that is gone when the block ends."""
    # The path of a socket in it may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    env = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray_cluster"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )
    try:
        yield RayCluster(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


class RayJob(contextlib.AbstractContextManager["RayJob"]):
    """A process with a job of ``tests.ray_job``.

    Args:
        cluster: where it runs.
        bundle: what it runs.
        prompts: its rows.
        output: its results.
        num_workers: each takes seconds of processors to start.
    """

    def __init__(
        self,
        cluster: RayCluster,
        bundle: Path,
        prompts: Path,
        output: Path,
        *,
        num_workers: int = 2,
    ) -> None:
        self._output = output
        arguments = [*map(str, (bundle, prompts, output)), cluster.address, str(num_workers)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_job", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        )

    def __exit__(self, *_: object) -> None:
        self.kill()

    def rows_done(self) -> int:
        """Rows whose results are written."""
        assert self._process.poll() in (None, 0, -signal.SIGKILL), self.ended()
        return self._output.read_bytes().count(b"\n") if self._output.exists() else 0

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def ended(self, seconds: float = 90.0) -> str:
        """Wait for its end; what it said."""
        return self._process.communicate(timeout=seconds)[0]


def wait_until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    """Wait for something that will come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


if __name__ == "__main__":
    main()
