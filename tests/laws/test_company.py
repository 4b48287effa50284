"""Company changes nothing: a sequence's logits are the same bits alone and in any schedule.

On the exported real model, each request of a pool first runs alone: one slot, nobody else, nothing
reused. Then schedules mix all of them: random are the order and the steps of arrival, aborts and
who reads along; slots, token budget, longest chunk and room for prefixes are chosen so that any two
values of the last three meet. Whatever lies behind a sequence's tokens is no number. Every row of
logits and every token must be what it was alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.contract import SAMPLER, SLOTS, cache_capacity
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import TokenLogprob
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from llama_runtime.tokenizer import Tokenizer
from tests.wrapped_backend import Digested

NUM_SLOTS = (4, 6, 13, 3, 8, 5, 7, 2, 6)
CHUNKS, BUDGETS, NUM_BLOCKS = (33, 64, 100), (33, 64, 128), (0, 3, 8)
# By number of threads. In nine schedules, any two of the three settings meet in all their values;
# in three of these, each setting takes all its values.
SCHEDULES = {1: range(9), 2: (0, 4, 8), 4: (1, 5, 6)}
MAX_LEN = 224
# Borders of chunks and of the kernel's query tiles are among the lengths.
PROMPT_LENGTHS = (1, 2, 7, 31, 32, 33, 34, 64, 65, 66, 97, 98, 129)
MAX_TOKENS, MAX_SPECULATED = 6, 10


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    params: SamplingParams


@dataclass
class Trace:
    """What happened to one sequence: a digest of each row of logits, its tokens, their scores."""

    rows: list[bytes]
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob | None]
    num_reused: int


class Recorded(Digested):
    """Keeps a digest of every row of logits that is sampled, and who ran together.

    What lies behind each sequence's tokens is made NaN before every step: whoever reads what
    somebody else, or a wrong guess, has left there shows it.
    """

    def __init__(self, backend: OrtCpu) -> None:
        super().__init__(backend)
        self._cache = backend._cache
        self.neighbours: set[tuple[int, int]] = set()  # by the lengths of their prompts

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        for chunk in step.chunks:
            for buffer in self._cache:
                buffer[chunk.seq.slot, :, chunk.seq.cache_len :] = np.nan
        lengths = sorted(chunk.seq.num_prompt_tokens for chunk in step.chunks)
        self.neighbours.update(combinations(lengths, 2))
        return super().run(step)


def pool(vocab_size: int) -> list[Request]:
    """Every parameter is on in some and off in others; three are held to a grammar."""
    choose = random.Random(0)
    requests = []
    beginning = [choose.randrange(vocab_size) for _ in range(max(PROMPT_LENGTHS))]
    for i, length in enumerate(PROMPT_LENGTHS):
        speculates, held = i % 2 == 1, i in (4, 8, 11)
        params = SamplingParams(
            max_tokens=MAX_SPECULATED if speculates else MAX_TOKENS,
            min_tokens=0 if held else i % 4,
            temperature=(0.0, 0.8, 1.3)[i % 3],
            top_p=(0.95, 1.0)[i % 2],
            top_k=(0, 40, 300)[i // 2 % 3],
            min_p=(0.0, 0.02)[i // 3 % 2],
            repetition_penalty=(1.0, 1.2)[i // 2 % 2],
            presence_penalty=(0.0, 0.5)[i // 4 % 2],
            frequency_penalty=(0.0, -0.5)[i // 5 % 2],
            logit_bias={choose.randrange(vocab_size): 4.0} if i % 4 == 1 else {},
            seed=i,
            ignore_eos=not held,
            regex="([0-9]|[a-f]+ ){60}" if held else None,  # more than any has room for
            logprobs=i % 3 == 1,
            top_logprobs=5 * (i % 3 == 1),
            prompt_logprobs=i % 5 == 2,
            speculation="on" if speculates else "off",
            priority=i % 3 - 1,
            caller=(None, "a", "b")[i % 3],
        )
        # Most begin alike; those that speculate repeat themselves, so that something is guessed.
        prompt = beginning[:length]
        if i % 4 == 2:
            prompt = [choose.randrange(vocab_size) for _ in range(length)]
        if speculates:
            prompt[length // 2 :] = (prompt[:5] * length)[: length - length // 2]
            params = replace(params, temperature=0.0, repetition_penalty=1.0)
        requests.append(Request(prompt, params))
    return requests


class Runner:
    """Runs requests through one session, with any number of slots."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.threads = threads
        self.geometry = bundle.manifest.geometry
        self._session: Any = open_session(bundle.graph_path(SLOTS.name), threads)
        self._token_bytes = Tokenizer(bundle.tokenizer_path).byte_table
        self._kernels = OrtSampler(bundle.graph_path(SAMPLER), self.geometry.vocab_size, threads)
        end = 2  # which no completion comes to
        self._grammars = GrammarCompiler(bundle.tokenizer_path, self.geometry.vocab_size, [end])
        # Found out once, as `LLM` does when it loads.
        self.row_multiple = self._backend(num_slots=1, capacity=2).row_multiple
        self.num_guessed = self.num_right = 0
        self.neighbours: set[tuple[int, int]] = set()

    def _backend(
        self, num_slots: int, capacity: int, row_multiple: int | None = None, num_blocks: int = 0
    ) -> OrtCpu:
        return OrtCpu(
            self._session,
            self.geometry,
            num_slots=num_slots,
            capacity=capacity,
            row_multiple=row_multiple,
            num_prefix_blocks=num_blocks,
        )

    def run(
        self,
        requests: list[Request],
        slots: int,
        budget: int,
        chunk: int,
        choose: random.Random,
        num_blocks: int = 0,
        share_streamed: float = 0.5,
    ) -> tuple[list[Trace], int]:
        """The trace of each request, and how many were aborted on the way."""
        capacity = cache_capacity(MAX_LEN, chunk)
        recorded = Recorded(self._backend(slots, capacity, self.row_multiple, num_blocks))
        engine = slots_engine(
            recorded,
            self._token_bytes,
            (),
            vocab_size=self.geometry.vocab_size,
            max_batch=slots,
            max_len=MAX_LEN,
            prompt_budget=budget,
            max_chunk=chunk,
            num_prefix_blocks=num_blocks,
            kernels=self._kernels,
            grammars=self._grammars,
        )
        waiting = list(requests)
        sequences, num_aborted = [], 0
        while waiting or engine.has_work:
            arrivals = choose.choice([0, 1, 3, 5, len(waiting)]) if engine.has_work else 4
            streamed = choose.random() < share_streamed
            sequences += [
                engine.add(r.prompt, r.params, streamed=streamed) for r in waiting[:arrivals]
            ]
            del waiting[:arrivals]
            engine.step()
            alive = [seq.id for seq in sequences if seq.finish_reason is None]
            if len(requests) > 1 and alive and choose.random() < 0.05:
                engine.abort(choose.choice(alive))
                num_aborted += 1
        assert engine.num_failed_steps == 0
        engine.check()
        counters = engine.counters()
        self.num_guessed += counters.drafted_tokens
        self.num_right += counters.accepted_tokens
        self.neighbours |= recorded.neighbours
        traces = [
            Trace(
                recorded.rows.get(seq.id, []),
                seq.completion_token_ids,
                seq.logprobs,
                seq.prompt_logprobs,
                seq.num_reused,
            )
            for seq in sequences
        ]
        return traces, num_aborted


@pytest.fixture(scope="module", params=SCHEDULES, ids=lambda n: f"{n} threads")
def runner(request: pytest.FixtureRequest, real_bundle: Path) -> Runner:
    return Runner(open_bundle(real_bundle, verify="size"), request.param)


def test_schedule_never_shows(runner: Runner) -> None:
    """An aborted sequence's rows count too."""
    requests = pool(runner.geometry.vocab_size)
    alone = []
    for request in requests:
        (trace,), _ = runner.run([request], 1, 33, 33, random.Random(0))
        assert len(trace.rows) >= len(trace.token_ids) == request.params.max_tokens
        alone.append(trace)
    schedules = SCHEDULES[runner.threads]
    with_abort = with_reuse = 0
    for number in schedules:
        choose = random.Random(1000 * runner.threads + number)
        members = choose.sample(range(len(requests)), len(requests))
        row, column = divmod(number, 3)
        traces, num_aborted = runner.run(
            [requests[i] for i in members],
            slots=NUM_SLOTS[number],
            budget=BUDGETS[column],
            chunk=CHUNKS[row],
            choose=choose,
            num_blocks=NUM_BLOCKS[(row + column) % 3],
            share_streamed=0.5 * (number % 2),
        )
        with_abort += num_aborted > 0
        with_reuse += any(trace.num_reused for trace in traces)
        for i, trace in zip(members, traces, strict=True):
            where = f"schedule {number}, prompt of {len(requests[i].prompt)} tokens"
            assert trace.rows == alone[i].rows[: len(trace.rows)], where
            assert trace.token_ids == alone[i].token_ids[: len(trace.token_ids)], where
            assert trace.logprobs == alone[i].logprobs[: len(trace.logprobs)], where
            scored = len(trace.prompt_logprobs)
            assert trace.prompt_logprobs == alone[i].prompt_logprobs[:scored], where
    assert with_abort >= 0.6 * len(schedules)
    assert with_reuse >= 0.4 * len(schedules)
    assert len(runner.neighbours) >= 5 * len(schedules)
    assert 0.1 * runner.num_guessed < runner.num_right < 0.9 * runner.num_guessed
