"""How long decode steps take, the graph's part and the whole, and what they must do in it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime import SamplingParams, open_bundle
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.bench.work import stored, weight_bytes
from llama_runtime.contract import PROMPT_CHUNK, SAMPLER, SLOTS, cache_capacity
from llama_runtime.loading import PROMPT_BUDGET
from llama_runtime.slots_engine import slots_engine
from llama_runtime.slots_precision import slots_cache_dtype
from llama_runtime.step_batch import Step
from llama_runtime.tokenizer import Tokenizer
from scripts.bench_limits_work import cache_bytes, multiply_adds, weight_file

PROMPT_TOKENS = 32
STEPS = 16  # of all sequences at once, in a round
WARM_STEPS = 2  # before them
MAX_LEN = 128


@dataclass(frozen=True, slots=True)
class Round:
    """Decode steps of one round.

    Attributes:
        graph_s: the median step's seconds in the graph.
        step_s: seconds of the whole of it: scheduling, graph, sampling, text.
        fastest_s: the fastest step's seconds in the graph.
        num_bytes: that such a step must read, weights and cache, on average.
        operations: of its products; a multiply-add is two.
    """

    graph_s: float
    step_s: float
    fastest_s: float
    num_bytes: float
    operations: int


class TimedCpu(OrtCpu):
    """The backend, with a note of what the last step was.

    Attributes:
        seconds: how long it took.
        tokens: how many the cache held in all, if it decoded.
        decoding: how many sequences decoded in it, 0 if there was a prompt.
    """

    seconds = 0.0
    tokens = 0
    decoding = 0

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        """See ``Backend.run``."""
        started = time.perf_counter()
        logits = super().run(step)
        self.seconds = time.perf_counter() - started
        self.decoding = len(step.chunks) if step.unpack.shape[1] == 1 else 0
        self.tokens = int(step.seqlens_k[step.query_seqlens > 0].sum()) + self.decoding
        return logits


class Decoders:
    """A bundle, opened once, whose engines decode.

    Args:
        path: the bundle.
        threads: of the kernels.
        batches: how many sequences at once are asked for.
    """

    def __init__(self, path: Path, threads: int, batches: list[int]) -> None:
        self._bundle = open_bundle(path)
        self.geometry = self._bundle.manifest.geometry
        self._entries = stored(weight_file(self._bundle))
        self._table = Tokenizer(self._bundle.tokenizer_path).byte_table
        vocab_size = self.geometry.vocab_size
        self._sampler = OrtSampler(self._bundle.graph_path(SAMPLER), vocab_size, threads)
        self._prompts = np.random.default_rng(0)
        session = open_session(self._bundle.graph_path(SLOTS.name), threads)
        self._backends = {batch: self._backend(session, batch) for batch in batches}

    def round(self, batch: int) -> Round:
        """Prompts, then steps that decode all sequences."""
        engine = self._engine(batch)
        params = SamplingParams(max_tokens=MAX_LEN - PROMPT_TOKENS, ignore_eos=True)
        for _ in range(batch):
            prompt = self._prompts.integers(0, self.geometry.vocab_size, PROMPT_TOKENS).tolist()
            engine.add(prompt, params)
        backend = self._backends[batch]
        seen: list[tuple[float, float, int]] = []
        while len(seen) < WARM_STEPS + STEPS:
            if not engine.has_work:
                raise RuntimeError(f"{batch} sequences ended before {STEPS} steps of all of them")
            started = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - started
            if backend.decoding == batch:
                seen.append((backend.seconds, whole, backend.tokens))
        graph, whole_steps, tokens = zip(*seen[WARM_STEPS:], strict=True)
        return Round(
            median(graph),
            median(whole_steps),
            min(graph),
            weight_bytes(self._entries, batch) + cache_bytes(self._bundle, mean(tokens)),
            2 * multiply_adds(self.geometry, batch),
        )

    def close(self) -> None:
        """Give the memory back."""
        for backend in self._backends.values():
            backend.close()

    def _backend(self, session: Any, batch: int) -> TimedCpu:
        return TimedCpu(
            session,
            self.geometry,
            num_slots=batch,
            capacity=cache_capacity(MAX_LEN, PROMPT_CHUNK),
            cache_dtype=slots_cache_dtype(self._bundle),
        )

    def _engine(self, batch: int) -> Any:
        return slots_engine(
            self._backends[batch],
            self._table,
            eos_token_ids=(),
            vocab_size=self.geometry.vocab_size,
            max_batch=batch,
            max_len=MAX_LEN,
            prompt_budget=PROMPT_BUDGET,
            max_chunk=PROMPT_CHUNK,
            kernels=self._sampler,
        )
