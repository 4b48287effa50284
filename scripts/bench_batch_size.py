"""What a batch whose size is found gives, against the best size that could have been chosen."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, NamedTuple

import numpy as np

from llama_runtime import LLM, SamplingParams
from llama_runtime.completion import Request
from llama_runtime.params import row_seed
from scripts.bench_machine import machine

ASKED = 0.95  # of the throughput of the best fixed size
Size = int | Literal["auto"]
Results = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """Requests, and how they come.

    Attributes:
        number: of requests.
        prompt, new: the least and the most tokens of prompts and of completions.
        sizes: that are worth a comparison.
        at_once: how many are in flight together; None for all.
    """

    number: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    sizes: tuple[int, ...]
    at_once: int | None = None

    def requests(self) -> list[Request]:
        """The same ones at each call."""
        rng = np.random.default_rng(1)
        return [
            Request(
                rng.integers(1000, 40_000, int(rng.integers(*self.prompt, endpoint=True))).tolist(),
                SamplingParams(
                    max_tokens=int(rng.integers(*self.new, endpoint=True)),
                    ignore_eos=True,
                    seed=row_seed(1, i),
                ),
            )
            for i in range(self.number)
        ]


LOADS = {
    "burst": Load(160, (8, 24), (16, 40), (32, 64, 128)),
    "trickle": Load(24, (8, 64), (16, 32), (8, 32), at_once=3),
    "long": Load(64, (16, 192), (16, 160), (16, 32, 64)),
}


class Run(NamedTuple):
    """One load, run once.

    Attributes:
        tokens_per_s: of completions.
        tokens_per_cpu_s: the same by the time of the processors, which tells more where something
            else runs on the machine; with one thread, because others spin while they wait.
        latency: mean seconds from when a request could have begun to its end.
        decisions: of the batch's size.
        limit: the size in the end.
    """

    tokens_per_s: float
    tokens_per_cpu_s: float
    latency: float
    decisions: list[str]
    limit: int


def main() -> None:
    """Measure, and print the figures; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--load", choices=list(LOADS), action="append", help="only this one")
    args = parser.parse_args()
    results: Results = {**machine(), "threads": args.threads, "rounds": args.rounds, "asked": ASKED}
    for name in args.load or LOADS:
        results[name] = compare(name, LOADS[name], args.bundle, args.threads, args.rounds)
    print(json.dumps(results))


def compare(name: str, load: Load, bundle: Path, threads: int, rounds: int) -> Results:
    """Each size and "auto" in turns, a fresh model each time; medians of the rounds."""
    sizes: list[Size] = [*load.sizes, "auto"]
    runs: dict[Size, list[Run]] = {size: [] for size in sizes}
    for number in range(rounds):
        for size in sizes if number % 2 == 0 else reversed(sizes):
            runs[size].append(run(load, bundle, threads, size))
    speed = {size: median(one.tokens_per_s for one in several) for size, several in runs.items()}
    by_cpu = {size: median(run.tokens_per_cpu_s for run in of) for size, of in runs.items()}
    latency = {size: median(one.latency for one in several) for size, several in runs.items()}
    best = max(load.sizes, key=lambda size: speed[size])
    # Rounds are compared one by one: what else the machine does changes from one to the next.
    ratio = median(
        auto.tokens_per_s / fixed.tokens_per_s
        for auto, fixed in zip(runs["auto"], runs[best], strict=True)
    )
    cpu_ratio = by_cpu["auto"] / max(by_cpu[size] for size in load.sizes)
    print(f"{name}: {load.number} requests")
    for size in sizes:
        print(
            f"  max_batch {size:>4}  {speed[size]:7.1f} tokens/s, {by_cpu[size]:7.1f} a CPU "
            f"second  {latency[size]:6.2f} s latency"
        )
    print(f"  auto / {best}: {ratio:.3f} (asked {ASKED}), {runs['auto'][-1].limit} in the end")
    print(f"  auto / the best by processors' seconds: {cpu_ratio:.3f}")
    for reason in runs["auto"][-1].decisions:
        print(f"    {reason}")
    print(end="", flush=True)
    return {
        "tokens_per_s": {str(size): value for size, value in speed.items()},
        "latency_s": {str(size): value for size, value in latency.items()},
        "each": {str(s): [one.tokens_per_s for one in several] for s, several in runs.items()},
        "best": best,
        "ratio": ratio,
        "tokens_per_cpu_s": {str(size): value for size, value in by_cpu.items()},
        "cpu_ratio": cpu_ratio,
        "decisions": [one.decisions for one in runs["auto"]],
    }


def run(load: Load, bundle: Path, threads: int, size: Size) -> Run:
    """Run a load once, with a model of its own that is warm."""
    requests = load.requests()
    max_len = load.prompt[1] + load.new[1]
    with LLM(bundle, max_batch=size, max_len=max_len, threads=threads, prefix_tokens=0) as llm:
        llm.warm_up()
        begun: dict[int, float] = {}
        latencies: list[float] = []
        done = num_tokens = 0

        def come() -> Iterator[Request | None]:
            for i, request in enumerate(requests):
                while load.at_once is not None and i - done >= load.at_once:
                    yield None
                begun[i] = started if load.at_once is None else time.perf_counter()
                yield request

        started, cpu = time.perf_counter(), time.process_time()
        for index, completion in llm.run(come()):
            latencies.append(time.perf_counter() - begun[index])
            num_tokens += len(completion.token_ids)
            done += 1
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        stats = llm.stats()
    decisions = [decision.reason for decision in stats.batch_decisions]
    speed, by_cpu = num_tokens / seconds, num_tokens / cpu
    return Run(speed, by_cpu, mean(latencies), decisions, stats.batch_limit)


if __name__ == "__main__":
    main()
