"""A server under load: requests at a rate, so many at once, and what came of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import isinf
from pathlib import Path

import numpy as np

from llama_runtime.bench.api_client import ApiClient, Endpoint
from llama_runtime.bench.figures import errors_of, figures
from llama_runtime.bench.http_client import Server
from llama_runtime.bench.lengths import Lengths
from llama_runtime.bench.record import Record, about, thinned
from llama_runtime.bench.served_prompts import WORDS, Talks, Words
from llama_runtime.bench.sharegpt import read_sharegpt
from llama_runtime.bench.trace import Trace
from llama_runtime.bench.workload import Ask
from llama_runtime.progress import Console

PROBES = (4, 24)  # words; a context may be short


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a user asks of ``llama-run bench --serve``; see its help.

    Attributes:
        url: of the server.
        endpoint: which way of asking.
        model: its name; None for the server's first.
        key: what the server wants to be told; None for nothing.
        max_concurrency: requests at once, one number a run; None for any number.
        request_rate: requests a second; infinite for all at the start.
        request_timeout: seconds that one may take.
        input_lens: prompt tokens, one after the other; ignored with a data set.
        output_lens: completion tokens, with each of those; None for the replies of a data set.
        num_prompts: requests of a run.
        dataset_path: a file in ShareGPT's form; None for words.
        seed: of prompts, lengths and arrivals.
        rounds: how often each run is made, with other prompts; the one in the middle counts.
    """

    url: str
    endpoint: Endpoint
    model: str | None
    key: str | None
    max_concurrency: Seq[int | None]
    request_rate: float
    request_timeout: float
    input_lens: Seq[Lengths]
    output_lens: Seq[Lengths] | None
    num_prompts: int
    dataset_path: Path | None
    seed: int
    rounds: int


def run_served(options: ServeOptions, console: Console) -> Record:
    """Measure.

    Raises:
        CaravanError: there is no such server, or it can't answer a first request.
    """
    client = ApiClient(
        Server.at(options.url),
        options.endpoint,
        key=options.key,
        timeout=options.request_timeout,
        model=options.model,
    )
    load = _Load(options, client)
    with console.status(load.status):
        runs = asyncio.run(load.run())
    record = about(
        "llama-run bench --serve",
        model=client.model,
        base_url=options.url,
        endpoint=options.endpoint,
        dataset="words" if options.dataset_path is None else str(options.dataset_path),
        num_prompts=options.num_prompts,
        seed=options.seed,
        rounds=options.rounds,
    )
    record["limits"] = None
    record["runs"] = runs
    record["notes"] = list(_notes(runs, client))
    return record


class _Load:
    """The runs.

    Args:
        options: what is wanted.
        client: asks.
    """

    def __init__(self, options: ServeOptions, client: ApiClient) -> None:
        self._options, self._client = options, client
        self._done, self._failed, self._total = 0, 0, 0
        self._now = "connecting"

    def status(self) -> list[str]:
        """How far it is, the most important first."""
        parts = [f"{self._done}/{self._total} requests", self._now]
        return [*parts, f"{self._failed} failed"] if self._failed else parts

    async def run(self) -> list[Record]:
        """All of them."""
        options = self._options
        await self._client.find_model()
        sources = await self._sources()
        self._total = (
            len(sources) * len(options.max_concurrency) * options.rounds * options.num_prompts
        )
        runs = []
        for source in sources:
            for most in options.max_concurrency:
                self._now = f"{most or 'any number'} at once"
                rounds = []
                for number in range(options.rounds):
                    asks = source.asks(options.num_prompts, options.seed + number)
                    rounds.append(await self._drive(asks, most, options.seed + number))
                runs.append(self._record(source, most, rounds))
        return runs

    async def _sources(self) -> list[Words] | list[Talks]:
        """Where prompts come from, of each kind that is wanted."""
        options = self._options
        if options.dataset_path is not None:
            talks = read_sharegpt(options.dataset_path)
            await self._client.probe(Ask(WORDS[0], 2))
            return [Talks(talks, lengths) for lengths in options.output_lens or (None,)]
        counted = []
        for num_words in PROBES:
            trace = await self._client.probe(Ask(" ".join(WORDS[:num_words]), 2))
            counted.append(trace.input_len)
        per_word = max((counted[1] - counted[0]) / (PROBES[1] - PROBES[0]), 0.0) or 1.0
        around = max(counted[0] - per_word * PROBES[0], 0.0)
        return [
            Words(input_len, output_len, per_word, around)
            for input_len in options.input_lens
            for output_len in options.output_lens or ()
        ]

    async def _drive(self, asks: Seq[Ask], most: int | None, seed: int) -> _Round:
        """One run: requests as they arrive, no more than so many at once."""
        places = asyncio.Semaphore(most or len(asks))
        numbers = np.random.default_rng(seed)
        rate = self._options.request_rate
        open_now, samples = 0, [(0.0, 0)]
        started = time.perf_counter()

        async def one(wanted: Ask) -> Trace:
            nonlocal open_now
            async with places:
                samples.append((time.perf_counter() - started, open_now))
                open_now += 1
                trace = await self._client.complete(wanted)
                samples.append((time.perf_counter() - started, open_now))
                open_now -= 1
            self._done += 1
            self._failed += trace.error is not None
            return trace

        tasks = []
        due = started
        for wanted in asks:
            if not isinf(rate):
                due += float(numbers.exponential(1 / rate))
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(wanted)))
        traces = await asyncio.gather(*tasks)
        return _Round(traces, time.perf_counter() - started, samples, list(asks))

    def _record(self, source: Words | Talks, most: int | None, rounds: Seq[_Round]) -> Record:
        """Of the round in the middle, by its output tokens a second; errors of all."""
        ordered = sorted(rounds, key=lambda one: one.rate)
        chosen = ordered[len(ordered) // 2]
        rate = self._options.request_rate
        return {
            "backend": "openai-chat" if self._options.endpoint == "chat" else "openai",
            "endpoint_type": "openai-chat" if self._options.endpoint == "chat" else "openai",
            "model_id": self._client.model,
            "input_len": source.input_len,
            "output_len": source.output_len,
            "num_prompts": self._options.num_prompts,
            "request_rate": "inf" if isinf(rate) else rate,
            "burstiness": 1.0,
            "max_concurrency": most,
            **figures(chosen.traces, chosen.duration),
            "durations": [one.duration for one in rounds],
            "failed_in_all_rounds": sum(
                trace.error is not None for one in rounds for trace in one.traces
            ),
            "short_completions": chosen.num_short,
            "errors": errors_of([trace for one in rounds for trace in one.traces]),
            "error_messages": {
                trace.error: trace.message
                for one in rounds
                for trace in one.traces
                if trace.error is not None and trace.message
            },
            "occupancy": thinned(chosen.samples),
        }


@dataclass(frozen=True, slots=True)
class _Round:
    """What came of one run."""

    traces: list[Trace]
    duration: float
    samples: list[tuple[float, int]]
    asks: list[Ask]

    @property
    def rate(self) -> float:
        """Completion tokens a second."""
        return sum(t.output_len for t in self.traces if t.error is None) / self.duration

    @property
    def num_short(self) -> int:
        """Completions that have other than so many tokens as were asked for."""
        pairs = zip(self.traces, self.asks, strict=True)
        return sum(t.error is None and t.output_len != ask.output_len for t, ask in pairs)


def _notes(runs: Seq[Record], client: ApiClient) -> Iterator[str]:
    """What a reader of the figures has to know."""
    failed = sum(run["failed_in_all_rounds"] for run in runs)
    if failed:
        kinds: Counter[str] = Counter()
        said: dict[str, str] = {}
        for run in runs:
            kinds.update(run["errors"])
            said |= run["error_messages"]
        several = "; ".join(
            f"{kind}, {count}" + (f", such as: {said[kind]}" if kind in said else "")
            for kind, count in kinds.most_common()
        )
        yield f"{failed} requests failed: {several}."
    short = sum(run["short_completions"] for run in runs)
    if short:
        yield f"{short} completions have other than as many tokens as were asked for."
    if not client.ignores_eos:
        yield "The server doesn't take ignore_eos, so completions may end early."
    if not client.counts_usage:
        yield (
            "Some streams didn't say how many tokens they had: their pieces were counted, and none "
            "of their prompts."
        )
