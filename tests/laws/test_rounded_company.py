"""Company changes nothing where weights, activations or the cache are rounded either.

On a small model: each request runs alone, then all of them in random schedules, beside one whose
logits are no numbers. What lies behind a sequence's tokens, and in slots that nobody holds, is as
far off as the cache's type can be. Prompts begin alike, so that much of them is taken over from
others, and some requests speculate.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers

from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.contract import cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.params import SamplingParams
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from tests.int8_cache import NO_NUMBER, Int8Cached
from tests.rounded import Rounded, write_rounded
from tests.wrapped_backend import Digested

MAX_LEN = 224
LENGTHS = (1, 2, 31, 33, 34, 64, 66, 97, 129, 170)
SCHEDULES = {1: 6, 2: 3}  # by number of threads
PRECISIONS: dict[str, tuple[str, int | None, str]] = {
    "fp32+int8kv": ("fp32", None, "int8"),
    "int8": ("int8", None, "same"),
    "int8+int8kv": ("int8", None, "int8"),
    "int4": ("int4", 32, "same"),
    "int4 in 128": ("int4", 128, "same"),
    "int4 with offsets": ("int4", 32, "same"),
}


@dataclass(frozen=True)
class Trace:
    """What happened to one sequence: a digest of each row of logits, and its tokens."""

    rows: list[bytes]
    token_ids: list[int]
    num_reused: int
    failed: bool


class Recorded(Digested):
    """Keeps a digest of each sampled row, and overwrites what nobody may read."""

    def __init__(self, backend: OrtCpu, choose: random.Random) -> None:
        super().__init__(backend)
        self._cache = backend._cache
        is_float = self._cache[0].dtype == np.float32
        self._fill = np.nan if is_float else choose.choice((-128, 127))

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        used = {chunk.seq.slot: chunk.seq.cache_len for chunk in step.chunks}
        for buffer in self._cache:
            for slot, cells in enumerate(buffer):
                if slot in used:
                    cells[:, used[slot] :] = self._fill
        return super().run(step)


class Runner:
    """Runs requests through one session."""

    def __init__(self, model: Int8Cached | Rounded, table: TokenBytes, threads: int) -> None:
        self.threads = threads
        self._geometry = model.config.geometry
        self._session: Any = open_session(model.graph, threads)
        self._table = table
        self.row_multiple = self._backend(1, 2, None, 0).row_multiple
        self.num_guessed = self.num_right = 0

    def _backend(self, slots: int, capacity: int, multiple: int | None, blocks: int) -> OrtCpu:
        return OrtCpu(
            self._session,
            self._geometry,
            num_slots=slots,
            capacity=capacity,
            row_multiple=multiple,
            num_prefix_blocks=blocks,
        )

    def run(
        self, requests: list[tuple[list[int], SamplingParams]], slots: int, seed: int
    ) -> list[Trace]:
        """What happened to each."""
        choose = random.Random(seed)
        chunk, blocks = choose.choice((33, 64, 100)), 0 if slots == 1 else choose.choice((3, 8))
        capacity = cache_capacity(MAX_LEN, chunk)
        recorded = Recorded(self._backend(slots, capacity, self.row_multiple, blocks), choose)
        engine = slots_engine(
            recorded,
            self._table,
            (),
            vocab_size=self._geometry.vocab_size,
            max_batch=slots,
            max_len=MAX_LEN,
            prompt_budget=choose.choice((33, 64, 128)),
            max_chunk=chunk,
            num_prefix_blocks=blocks,
        )
        waiting, sequences = list(requests), []
        while waiting or engine.has_work:
            arrivals = choose.choice((0, 1, 3, len(waiting))) if engine.has_work else 2
            sequences += [engine.add(*request) for request in waiting[:arrivals]]
            del waiting[:arrivals]
            engine.step()
        assert engine.num_failed_steps == 0
        engine.check()
        counters = engine.counters()
        self.num_guessed += counters.drafted_tokens
        self.num_right += counters.accepted_tokens
        return [
            Trace(
                recorded.rows.get(seq.id, []),
                seq.completion_token_ids,
                seq.num_reused,
                seq.finish_reason == "error",
            )
            for seq in sequences
        ]


def pool() -> list[tuple[list[int], SamplingParams]]:
    """Most begin alike, some repeat themselves and speculate; the last one's text has no number."""
    choose = random.Random(5)
    beginning = choose.choices(range(3, NO_NUMBER), k=max(LENGTHS))
    found = []
    for i, length in enumerate(LENGTHS):
        speculates = i % 3 == 1
        prompt = beginning[:length]
        if speculates:
            prompt[length // 2 :] = prompt[:1] * (length - length // 2)
        params = SamplingParams(
            max_tokens=12,
            temperature=0.0 if speculates else 0.5 * (i % 3),
            logit_bias={prompt[0]: 2.0} if speculates else {},  # so that some guesses are right
            seed=i,
            ignore_eos=True,
            speculation="on" if speculates else "off",
        )
        found.append((prompt, params))
    # What is no number is some byte in the cache, so only its own row shows it.
    faulty = [*beginning[:70], NO_NUMBER, *beginning[:20], NO_NUMBER]
    return [*found, (faulty, SamplingParams(max_tokens=3, temperature=0.0))]


@pytest.fixture(scope="module", params=PRECISIONS)
def model(
    request: pytest.FixtureRequest,
    int8_cached: Int8Cached,
    tmp_path_factory: pytest.TempPathFactory,
) -> Int8Cached | Rounded:
    if request.param == "fp32+int8kv":
        return int8_cached
    name, block, kv_cache = PRECISIONS[request.param]
    folder = tmp_path_factory.mktemp("rounded")
    config = replace(int8_cached.config, hidden_size=128, intermediate_size=256)
    return write_rounded(
        folder,
        config,
        name,
        block=block,
        kv_cache=kv_cache,
        offsets="offsets" in request.param,
        no_numbers=(NO_NUMBER,),
    )


@pytest.fixture(params=SCHEDULES, ids=lambda n: f"{n} threads")
def runner(
    request: pytest.FixtureRequest,
    model: Int8Cached | Rounded,
    byte_tokenizer: tokenizers.Tokenizer,
) -> Runner:
    return Runner(model, TokenBytes(byte_tokenizer), request.param)


def test_schedule_never_shows(runner: Runner) -> None:
    requests = pool()
    alone = [runner.run([request], 1, 0)[0] for request in requests]
    assert [trace.failed for trace in alone] == [False] * len(LENGTHS) + [True]
    num_reused = 0
    for seed in range(SCHEDULES[runner.threads]):
        choose = random.Random(100 * runner.threads + seed)
        members = choose.sample(range(len(requests)), len(requests))
        found = runner.run([requests[i] for i in members], choose.randint(2, 7), seed)
        for i, trace in zip(members, found, strict=True):
            where = f"schedule {seed}, prompt of {len(requests[i][0])} tokens"
            assert trace.rows == alone[i].rows, where
            assert trace.token_ids == alone[i].token_ids, where
            num_reused += trace.num_reused
    assert num_reused > 100 * SCHEDULES[runner.threads]
    assert 0.1 * runner.num_guessed < runner.num_right < 0.9 * runner.num_guessed
