"""Strategies side by side: a bundle on this machine, the same requests for each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from llama_runtime.bench import peak_memory
from llama_runtime.bench.figures import figures
from llama_runtime.bench.lengths import Lengths
from llama_runtime.bench.limits import Limits, measure
from llama_runtime.bench.record import Record, about, thinned
from llama_runtime.bench.sharegpt import read_sharegpt
from llama_runtime.bench.strategies import Run, run_strategy, sizes
from llama_runtime.bench.work import Work
from llama_runtime.bench.workload import Ask, Workload, from_talks, synthetic
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.loading import Loaded, load, runs_on_gpu, runs_on_tensorrt
from llama_runtime.machine import default_threads
from llama_runtime.progress import Console, duration
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.settings import Settings, in_range
from llama_runtime.slots_precision import slots_cache_dtype

WARM_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOptions:
    """What a user asks of ``llama-run bench`` without a server; see its help.

    Attributes:
        bundle: the model.
        strategies: some of ``STRATEGIES``.
        batch_sizes: how many run at once, rising.
        input_lens: prompt tokens, one after the other; ignored with a data set.
        output_lens: completion tokens, with each of those; None for the replies of a data set.
        num_prompts: requests of a run.
        dataset_path: a file in ShareGPT's form; None for random tokens.
        seed: of prompts and lengths.
        rounds: how often each run is made; the one in the middle counts.
        threads: of the kernels.
        devices: of CUDA.
    """

    bundle: Path
    strategies: Seq[str]
    batch_sizes: Seq[int]
    input_lens: Seq[Lengths]
    output_lens: Seq[Lengths] | None
    num_prompts: int
    dataset_path: Path | None
    seed: int
    rounds: int
    threads: int | None
    devices: Seq[int] | None


def run_local(options: LocalOptions, console: Console) -> Record:
    """Measure.

    Raises:
        CaravanError: the bundle or the data set can't be used, or a size doesn't fit into memory.
    """
    encoder = PromptEncoder(open_bundle(options.bundle))
    workloads = _workloads(options, encoder)
    bench = _Bench(options, encoder)
    bench.expect(workloads)
    with console.status(bench.status):
        for size, strategies in sizes(options.strategies, options.batch_sizes).items():
            with bench.loaded(size, max(workload.longest for workload in workloads)) as loaded:
                for workload in workloads:
                    bench.run(loaded, size, strategies, workload)
    record = about(
        "llama-run bench",
        model=encoder.bundle.manifest.name,
        precision=bench.precision,
        bundle=str(options.bundle),
        dataset="random" if options.dataset_path is None else str(options.dataset_path),
        num_prompts=options.num_prompts,
        seed=options.seed,
        rounds=options.rounds,
        threads=bench.threads,
        devices=None if options.devices is None else list(options.devices),
    )
    record["limits"] = None
    if bench.limits is not None:
        record["limits"] = {**asdict(bench.limits), "kind": bench.limits.kind_of(bench.precision)}
    kinds = [(workload.input_len, workload.output_len) for workload in workloads]
    record["runs"] = sorted(
        bench.runs, key=lambda run: kinds.index((run["input_len"], run["output_len"]))
    )
    record["notes"] = bench.notes()
    return record


def _workloads(options: LocalOptions, encoder: PromptEncoder) -> list[Workload]:
    geometry = encoder.bundle.manifest.geometry
    if options.dataset_path is None:
        found = [
            synthetic(geometry.vocab_size, input_len, output_len, options.num_prompts, options.seed)
            for input_len in options.input_lens
            for output_len in options.output_lens or ()
        ]
        longest = max(workload.longest for workload in found)
        if longest > geometry.max_positions:
            raise CapacityError(
                f"--input-len and --output-len come to {longest:,} tokens, over the model's limit "
                f"{geometry.max_positions:,}: give smaller ones",
                param="input_len",
            )
        return found
    talks = read_sharegpt(options.dataset_path)
    return [
        from_talks(
            talks,
            encoder.encode,
            output_len,
            options.num_prompts,
            options.seed,
            geometry.max_positions,
        )
        for output_len in options.output_lens or (None,)
    ]


class _Bench:
    """The runs of one bundle.

    Args:
        options: what is wanted.
        encoder: the open bundle.

    Attributes:
        precision: of the bundle's graph.
        threads: of the kernels; None on a GPU.
        limits: what the machine or the device reaches; None with TensorRT or several devices, where
            nothing measures it.
        runs: what came of them.
    """

    def __init__(self, options: LocalOptions, encoder: PromptEncoder) -> None:
        self._options, self._encoder = options, encoder
        manifest = encoder.bundle.manifest
        self.on_gpu = runs_on_gpu(encoder.bundle)
        self.precision = next(g.precision for g in manifest.graphs if g.dialect != "sampler")
        self.threads: int | None = None
        self.limits: Limits | None = None
        self.runs: list[Record] = []
        self._work: Work | None = None
        if self.on_gpu and options.threads is not None:
            raise RequestError(
                f"threads must be left out: {encoder.bundle.path} was built for CUDA, and has none",
                param="threads",
            )
        if not self.on_gpu:
            wanted = default_threads() if options.threads is None else options.threads
            self.threads = in_range("threads", wanted, 1024)
            self._work = Work(encoder.bundle, slots_cache_dtype(encoder.bundle))
            self.limits = measure(self.threads)
        elif self._num_engines == 1 and not runs_on_tensorrt(encoder.bundle):
            from llama_runtime.bench.device_limits import measure_device
            from llama_runtime.cuda_loading import cuda_cache_dtype

            self._work = Work(encoder.bundle, cuda_cache_dtype(encoder.bundle))
            self.limits = measure_device((options.devices or [0])[0])
        self._first: dict[int, list[list[int]]] = {}  # tokens of the first run of a workload
        self._differing: dict[str, int] = {}
        self._now, self._done, self._total = "loading", 0, 0
        self._started = time.monotonic()
        self._free_before = 0

    def expect(self, workloads: Seq[Workload]) -> None:
        """Learn how many runs there are to be."""
        several = sizes(self._options.strategies, self._options.batch_sizes).values()
        self._total = sum(map(len, several)) * len(workloads) * self._options.rounds

    def status(self) -> list[str]:
        """How far it is, the most important first."""
        parts = [f"run {self._done + 1} of {self._total}", self._now]
        if self._done:
            spent = time.monotonic() - self._started
            left = spent * (self._total - self._done) / self._done
            parts.append(f"about {duration(left)} left")
        return parts

    @contextmanager
    def loaded(self, size: int, max_len: int) -> Iterator[Loaded]:
        """The bundle with so many slots, warm."""
        self._free_before = self._device_free()
        loaded = load(
            self._encoder,
            Settings(
                max_batch=size,
                max_len=max_len,
                threads=self.threads,
                devices=self._options.devices,
                prefix_tokens=0,  # or else a second run would be spared work
            ),
            verify=None,
        )
        try:
            new = min(WARM_TOKENS, max_len - 1)
            asks = [Ask((0,), new)] * size * self._num_engines
            run_strategy("continuous", loaded.engine, asks, size)
            yield loaded
        finally:
            loaded.engine.close()

    def run(self, loaded: Loaded, size: int, strategies: Seq[str], workload: Workload) -> None:
        """Run a workload by each strategy, in turns."""
        slots = size * self._num_engines
        rounds: dict[str, list[tuple[Run, int | None]]] = {name: [] for name in strategies}
        for number in range(self._options.rounds):
            for name in strategies if number % 2 == 0 else reversed(strategies):
                self._now = f"{name}, batch {size}"
                peak_memory.reset()
                run = run_strategy(name, loaded.engine, workload.asks, slots)
                rounds[name].append((run, self._peak()))
                self._compare(f"{name} {size}", workload, run)
                self._done += 1
        for name, several in rounds.items():
            self.runs.append(self._record(name, size, workload, several))

    def _record(
        self, name: str, size: int, workload: Workload, rounds: list[tuple[Run, int | None]]
    ) -> Record:
        """Of the round in the middle, by its duration."""
        ordered = sorted(rounds, key=lambda pair: pair[0].duration)
        run, _ = ordered[(len(ordered) - 1) // 2]
        peaks = [peak for _, peak in rounds if peak is not None]
        found: Record = {
            "backend": "caravan",
            "model_id": self._encoder.bundle.manifest.name,
            "strategy": name,
            "batch_size": size,
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "num_prompts": len(workload.asks),
            "request_rate": "inf",
            "max_concurrency": size * self._num_engines,
            **figures(run.traces, run.duration),
            "durations": [one.duration for one, _ in rounds],
            "num_steps": run.num_steps,
            "peak_memory_bytes": max(peaks, default=None),
            "peak_memory_of": "device" if self.on_gpu else "process",
            **self._shares(run),
            "occupancy": thinned(run.occupancy),
        }
        return found

    def _shares(self, run: Run) -> Record:
        """What part of the machine's limits the run reached."""
        if self.limits is None or self._work is None:
            return {"bandwidth_share": None, "compute_share": None}
        lengths = [(trace.input_len, trace.output_len) for trace in run.traces]
        read = self._work.read_bytes(lengths, run.num_steps)
        operations = self._work.operations(lengths)
        rate = self.limits.rates[self.limits.kind_of(self.precision)]
        return {
            "bandwidth_share": read / run.duration / self.limits.bandwidth,
            "compute_share": operations / run.duration / rate,
        }

    def _compare(self, label: str, workload: Workload, run: Run) -> None:
        first = self._first.setdefault(id(workload), run.token_ids)
        pairs = zip(first, run.token_ids, strict=True)
        differing = sum(one != other for one, other in pairs)
        self._differing[label] = max(differing, self._differing.get(label, 0))

    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        wrong = {label: count for label, count in self._differing.items() if count}
        if not wrong:
            return ["All runs gave the same tokens."]
        several = ", ".join(f"{label}: {count}" for label, count in wrong.items())
        return [
            "Not all runs gave the same tokens as the first. Completions of "
            f"{self._options.num_prompts} that differ: {several}."
        ]

    @property
    def _num_engines(self) -> int:
        return len(self._options.devices or [0])

    def _peak(self) -> int | None:
        if self.on_gpu:
            return max(0, self._free_before - self._device_free())
        return peak_memory.peak_bytes()

    def _device_free(self) -> int:
        """Bytes that are free on all devices together; 0 on the CPU."""
        if not self.on_gpu:
            return 0
        from llama_runtime.cuda_loading import opened_devices

        free = 0
        with opened_devices(list(self._options.devices or [0])) as found:
            for device in found:
                free += device.memory()[0]
                device.close()
        return free
