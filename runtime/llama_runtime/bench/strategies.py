"""Four ways to run the same requests through one engine.

All requests are there from the start, so a time to first token includes the waiting. Graph, cache,
sampler and tokens are the same; only who runs in a step differs:

    sequential   one request at a time
    concurrent   as many as there are slots, each stepped alone, in turn
    static       batches: the next one begins when the last of the one before has ended
    continuous   a slot that becomes free is filled in the next step
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from llama_runtime.bench.trace import Trace
from llama_runtime.bench.workload import Ask
from llama_runtime.engine import Engine
from llama_runtime.engine_group import EngineGroup
from llama_runtime.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Run:
    """What came of the requests.

    Attributes:
        traces: when tokens came, in the requests' order.
        token_ids: what came, in the same.
        duration: seconds of all.
        num_steps: steps of the engine, each of which runs the graph once on each device.
        occupancy: seconds since the start and how many slots were held in the step that ended then.
    """

    traces: list[Trace]
    token_ids: list[list[int]]
    duration: float
    num_steps: int
    occupancy: list[tuple[float, int]]


def run_strategy(
    strategy: str,
    engine: Engine | EngineGroup,
    asks: Seq[Ask],
    num_slots: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Run requests to their end.

    Args:
        strategy: one of ``STRATEGIES``.
        engine: without work; whose prefixes aren't kept, or else a second run would be spared work.
        asks: the requests, with token ids; each fits the engine.
        num_slots: sequences that the engine runs at once.
        clock: seconds.

    Raises:
        BackendError: the graph failed.
    """
    size = {"sequential": 1, "static": num_slots}.get(strategy, len(asks))
    engine.run_apart(strategy == "concurrent")
    started = clock()
    traces = [Trace(started, len(ask.prompt)) for ask in asks]
    token_ids: list[list[int]] = [[] for _ in asks]
    occupancy = []
    num_steps = 0
    for first in range(0, len(asks), size):
        owners = {
            engine.add(*_arguments(asks[index])).id: index
            for index in range(first, min(first + size, len(asks)))
        }
        while engine.has_work:
            events = engine.step()
            now = clock()
            num_steps += 1
            if engine.failure is not None:
                raise engine.failure
            ended = 0
            for event in events:
                index = owners[event.sequence_id]
                if event.error is not None:
                    raise event.error
                if event.token_id is not None:
                    token_ids[index].append(event.token_id)
                    traces[index].times.append(now)
                    traces[index].output_len += 1
                ended += event.finish_reason is not None
            occupancy.append((now - started, engine.num_running + ended))
    return Run(traces, token_ids, clock() - started, num_steps, occupancy)


def sizes(strategies: Seq[str], batch_sizes: Seq[int]) -> dict[int, list[str]]:
    """Which strategies run with how many slots.

    One at a time all are the same, so there ``sequential`` stands for them if it is wanted. What is
    run concurrently takes as long with two as with many, so it runs with the most.
    """
    found: dict[int, list[str]] = {}
    if "sequential" in strategies:
        found[1] = ["sequential"]
    for size in batch_sizes:
        here = [name for name in strategies if name in ("static", "continuous")]
        if "concurrent" in strategies and size == max(batch_sizes):
            here.insert(0, "concurrent")
        if here and size not in found:
            found[size] = here
    return found


def _arguments(ask: Ask) -> tuple[list[int], SamplingParams]:
    """Greedy, and as many tokens as asked for, whatever they are."""
    if isinstance(ask.prompt, str):
        raise TypeError("an engine takes token ids")
    return list(ask.prompt), SamplingParams(
        temperature=0, max_tokens=ask.output_len, ignore_eos=True
    )
