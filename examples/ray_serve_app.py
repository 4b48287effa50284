"""Completions over HTTP from many machines, with Ray Serve: a question in, a text out as it grows.

    pip install 'llama-caravan[scale]'
    python examples/ray_serve_app.py bundle &
    curl -N -d 'What is the capital of Peru?' http://127.0.0.1:8000/

Each replica holds a model, and requests that overlap share its batch. Too many are refused with 429
and Retry-After; a client that hangs up frees its slot; a replica that is told to end, by a new
deployment or by ``serve.delete``, lets those in flight finish; one whose model has failed is
replaced. What a replica was answering when its process dies is cut: clients must ask again.

On a cluster, set RAY_ADDRESS to that of its head node; the bundle is at the same path on all nodes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's own ports aren't bound to the loopback

import ray
from ray import serve
from ray.serve.config import BackpressureConfig
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from llama_runtime import AsyncLLM, CaravanError, QueueFullError, RequestError, SamplingParams

SLOTS = 16  # sequences that a replica runs at once
QUEUED = 32  # requests that wait; one more is refused
SECONDS = 60.0  # for a request, the time that it waits for a slot included
PARAMS = SamplingParams(max_tokens=int(os.environ.get("MAX_TOKENS", "128")))


class Service:
    """A replica.

    Args:
        bundle: a directory, the same on all nodes.
        slots: sequences that run at once.
    """

    def __init__(self, bundle: str, slots: int = SLOTS) -> None:
        self._llm = AsyncLLM(bundle, max_batch=slots)

    async def __call__(self, request: Request) -> Response:
        """Answer a question. What is wrong with it is said before any text."""
        question = (await request.body()).decode(errors="replace").strip()
        messages = [{"role": "user", "content": question}]
        try:
            stream = self._llm.stream_chat(messages, PARAMS, timeout=SECONDS)
            await stream.start()
        except QueueFullError as error:
            return PlainTextResponse(f"{error}\n", 429, {"Retry-After": "1"})
        except (CaravanError, TimeoutError) as error:
            status = 400 if isinstance(error, RequestError) else 503
            return PlainTextResponse(f"{error}\n", status)

        async def texts() -> AsyncIterator[str]:
            async with stream:  # left when the client has gone, which gives the slot back
                try:
                    async for event in stream:
                        yield event.text
                except (CaravanError, TimeoutError) as error:
                    yield f"\nerror: {error}\n"

        return StreamingResponse(texts(), media_type="text/plain")

    async def running(self) -> int:
        """Sequences that hold a slot."""
        return self._llm.stats().running

    def check_health(self) -> None:
        """Asked by Serve, which replaces the replica if this raises."""
        if self._llm.health() == "failed":
            raise RuntimeError("the model has failed")


deployment = serve.deployment(
    Service,
    name="caravan",
    num_replicas=int(os.environ.get("REPLICAS", "1")),
    max_ongoing_requests=SLOTS,
    max_queued_requests=QUEUED,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
    health_check_period_s=5,
    graceful_shutdown_timeout_s=SECONDS + 5,
)


def main(bundle: str = "bundle", port: str = "8000") -> None:
    """Start what is needed, and serve until Ctrl-C."""
    if "RAY_ADDRESS" not in os.environ:
        ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    serve.run(deployment.bind(str(Path(bundle).absolute())), blocking=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
