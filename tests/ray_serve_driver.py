"""``examples/ray_serve_app.py`` in a process of its own: ``python -m tests.ray_serve_driver``.

Arguments: the bundle and a port. Steps of the model take ``STEP_SECONDS``, so that there is time
to interfere. It says ``ready``. Then each line of its standard input is a command that is answered
by a line: ``running`` by how many sequences run, ``delete`` when the replica has ended.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from examples.ray_serve_app import Service
from tests.ray_cluster import SMALL

STEP_SECONDS = 0.02


class Slow(Service):
    """The replica of the example, with a slow model."""

    def __init__(self, bundle: str, slots: int) -> None:
        super().__init__(bundle, slots)
        engine: Any = self._llm._worker._engine
        step = engine.step

        def slow_step(*args: Any) -> Any:
            time.sleep(STEP_SECONDS)
            return step(*args)

        engine.step = slow_step


def main(bundle: str, port: int) -> None:
    """Serve, and do as told."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, **SMALL})
    ray.init(cluster.address, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = serve.deployment(Slow).options(
        max_ongoing_requests=2,
        max_queued_requests=2,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.1,
    )
    handle = serve.run(deployment.bind(bundle, 2))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        if line == "running\n":
            answer = handle.running.remote().result()
        else:
            serve.delete("default")
            answer = "deleted"
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
