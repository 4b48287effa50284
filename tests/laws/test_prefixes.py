"""What prompts have in common is computed once, and nobody can tell from what comes out.

On the exported real model, many requests with a long common beginning give the same bits as without
reuse. With the fake backend, whose logits depend on every token that it finds in a slot, random
schedules with little room for kept prompts give what each request gives alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from llama_runtime.backends.base import Backend
from llama_runtime.backends.fake import Fake
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.contract import CHUNK_MULTIPLE, SLOTS, cache_capacity, last_chunk_start
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from llama_runtime.tokenizer import Tokenizer
from tests.tiny_model import byte_level_tokenizer
from tests.wrapped_backend import Digested

NUM_REQUESTS, NUM_SHARED = 64, 512
CHECKED = (0, 14, 15, 31)  # whose bits are looked at; two of them differ in the last token
MAX_CHUNK = 128


class Counted(Digested):
    """Counts the prompts' rows, and keeps a digest of each row that is sampled."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.num_prompt_rows = 0

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        logits = super().run(step)
        for chunk in step.chunks:
            seq = chunk.seq
            if seq.cache_len < seq.num_prompt_tokens:
                whole = seq.cache_len == last_chunk_start(seq.num_prompt_tokens)
                assert whole == chunk.samples, "the last chunk runs whole"
                self.num_prompt_rows += int(step.query_seqlens[(seq.slot or 0) - step.first_slot])
        return logits


# --- on the real model --------------------------------------------------------------------------


class Real:
    """Runs prompts through one session, with any number of slots and of kept blocks."""

    def __init__(self, bundle: Bundle) -> None:
        self.geometry = bundle.manifest.geometry
        self._session: Any = open_session(bundle.graph_path(SLOTS.name), 2)
        self._token_bytes = Tokenizer(bundle.tokenizer_path).byte_table
        self._row_multiple = OrtCpu(
            self._session, self.geometry, num_slots=1, capacity=2
        ).row_multiple

    def engine(self, num_slots: int, num_prefix_blocks: int) -> tuple[Engine, Counted]:
        max_len = NUM_SHARED + 64
        backend = Counted(
            OrtCpu(
                self._session,
                self.geometry,
                num_slots=num_slots,
                capacity=cache_capacity(max_len, MAX_CHUNK),
                row_multiple=self._row_multiple,
                num_prefix_blocks=num_prefix_blocks,
            )
        )
        engine = slots_engine(
            backend,
            self._token_bytes,
            (),
            vocab_size=self.geometry.vocab_size,
            max_batch=num_slots,
            max_len=max_len,
            prompt_budget=256,
            max_chunk=MAX_CHUNK,
            num_prefix_blocks=num_prefix_blocks,
        )
        return engine, backend


@pytest.fixture(scope="module")
def real(real_bundle: Path) -> Real:
    return Real(open_bundle(real_bundle, verify="size"))


def run(engine: Engine, prompts: list[list[int]], **params: Any) -> list[Sequence]:
    wanted = SamplingParams(max_tokens=2, ignore_eos=True, **params)
    seqs = [engine.add(prompt, wanted) for prompt in prompts]
    drain(engine)
    return seqs


def drain(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
        engine.check()
    assert engine.num_failed_steps == 0


def test_a_common_beginning_is_computed_once_and_gives_the_same_bits(real: Real) -> None:
    choose = random.Random(0)
    ids = range(real.geometry.vocab_size)
    shared = choose.choices(ids, k=NUM_SHARED)
    # Ends of 2 to 33 tokens and of more than a block: some of them keep a block of their own.
    prompts = [[*shared, *choose.choices(ids, k=2 + i % 40)] for i in range(NUM_REQUESTS)]
    prompts[15] = [*prompts[14][:-1], prompts[14][-1] ^ 1]
    prompts[63] = prompts[31]  # whose last chunk fills a block, and runs all the same
    expected: dict[int, tuple[list[bytes], list[int]]] = {}
    for i in CHECKED:
        engine, backend = real.engine(num_slots=1, num_prefix_blocks=0)
        (seq,) = run(engine, [prompts[i]])
        expected[i] = backend.rows[seq.id], seq.completion_token_ids
    assert len({rows[0] for rows, _ in expected.values()}) == len(CHECKED)

    engine, backend = real.engine(num_slots=16, num_prefix_blocks=40)
    seqs = run(engine, prompts)
    for i in CHECKED:
        assert (backend.rows[seqs[i].id], seqs[i].completion_token_ids) == expected[i], i
    assert backend.rows[seqs[63].id] == backend.rows[seqs[31].id]
    num_tokens, counters = sum(map(len, prompts)), engine.counters()
    assert backend.num_prompt_rows <= 0.25 * num_tokens
    assert backend.num_prompt_rows == num_tokens - counters.reused_tokens
    assert counters.prefix_hits == NUM_REQUESTS - 1
    assert counters.reused_tokens >= NUM_SHARED * (NUM_REQUESTS - 1)

    # A store that holds a part of it, and a beginning whose first owner is given up midway.
    engine, backend = real.engine(num_slots=3, num_prefix_blocks=7)
    first = engine.add(prompts[5], SamplingParams(max_tokens=2))
    engine.step()
    engine.abort(first.id)
    seqs = run(engine, [prompts[i] for i in CHECKED[:2]])
    for i, seq in zip(CHECKED, seqs, strict=False):
        assert (backend.rows[seq.id], seq.completion_token_ids) == expected[i], i
    assert [seq.num_reused for seq in seqs] == [MAX_CHUNK, 7 * CHUNK_MULTIPLE]


# --- on the fake --------------------------------------------------------------------------------

TABLE = TokenBytes(byte_level_tokenizer())
VOCAB_SIZE, MAX_LEN = 97, 256
END_TOKENS = frozenset({2, 3, 4, 5})


@dataclass(frozen=True)
class Request:
    """A prompt and its parameters, hashable, so that its run alone is computed once."""

    prompt: tuple[int, ...]
    params: SamplingParams

    @cache  # noqa: B019 - requests live as long as the tests
    def alone(self) -> list[int]:
        engine, _ = fake_engine(1, 0, 33, 33)
        seq = engine.add(self.prompt, self.params)
        while engine.has_work:
            engine.step()
        return seq.completion_token_ids


def fake_engine(
    num_slots: int, num_prefix_blocks: int, budget: int, chunk: int
) -> tuple[Engine, Counted]:
    capacity = cache_capacity(MAX_LEN, chunk)
    backend = Counted(Fake(num_slots, capacity, VOCAB_SIZE, num_prefix_blocks=num_prefix_blocks))
    engine = slots_engine(
        backend,
        TABLE,
        END_TOKENS,
        vocab_size=VOCAB_SIZE,
        max_batch=num_slots,
        max_len=MAX_LEN,
        prompt_budget=budget,
        max_chunk=chunk,
        num_prefix_blocks=num_prefix_blocks,
    )
    return engine, backend


def random_request(choose: random.Random) -> Request:
    """One of few beginnings, so that many prompts begin alike, and an end."""
    blocks = [choose.randrange(6, 8) for _ in range(choose.randint(0, 5))]
    beginning = [block for block in blocks for _ in range(CHUNK_MULTIPLE)]
    end = [choose.randrange(6, VOCAB_SIZE) for _ in range(choose.randint(1, 40))]
    params = SamplingParams(
        max_tokens=choose.randint(1, 6),
        temperature=choose.choice([0.0, 5.0]),
        seed=choose.randrange(4),
        cache_salt=choose.choice(["", "", "a", "b"]),
        prompt_logprobs=choose.random() < 0.1,
    )
    return Request((*beginning, *end), params)


def test_no_schedule_shows_whatever_is_kept_and_thrown_out() -> None:
    reused = evicting = with_abort = 0
    for seed in range(200):
        choose = random.Random(seed)
        num_blocks, chunk = choose.choice([1, 3, 8, 40]), choose.choice([33, 64, 100])
        engine, backend = fake_engine(
            choose.randint(1, 6), num_blocks, choose.choice([33, 64, 200]), chunk
        )
        waiting = [random_request(choose) for _ in range(choose.randint(2, 14))]
        asked: list[tuple[Request, Sequence]] = []
        aborted = False
        while waiting or engine.has_work:
            for _ in range(choose.choice([0, 1, 1, 3]) if engine.has_work else 1):
                if waiting:
                    request = waiting.pop()
                    asked.append((request, engine.add(request.prompt, request.params)))
            engine.step()
            engine.check()
            alive = [seq.id for _, seq in asked if seq.finish_reason is None]
            if alive and choose.random() < 0.04:
                engine.abort(choose.choice(alive))
                aborted = True
        assert engine.num_failed_steps == 0
        for request, seq in asked:
            tokens = seq.completion_token_ids
            whole = seq.finish_reason != "abort"
            assert tokens == (request.alone() if whole else request.alone()[: len(tokens)]), seed
            assert whole <= (len(seq.prompt_logprobs) in (0, seq.num_prompt_tokens))
        counters = engine.counters()
        assert counters.reused_tokens == sum(seq.num_reused for _, seq in asked)
        assert counters.prefix_hits == sum(seq.num_reused > 0 for _, seq in asked)
        reused += counters.reused_tokens
        evicting += num_blocks < 8
        with_abort += aborted
        if not aborted:
            num_tokens = sum(len(request.prompt) for request, _ in asked)
            assert backend.num_prompt_rows == num_tokens - counters.reused_tokens
    assert reused > 10_000
    assert evicting > 50
    assert 50 < with_abort < 150


def test_requests_of_different_salts_share_nothing() -> None:
    prompt = [7] * 200
    engine, backend = fake_engine(4, 40, 200, 100)
    salted = [SamplingParams(max_tokens=2, cache_salt=salt) for salt in ("", "a", "b")]
    seqs = [engine.add(prompt, params) for params in salted]
    drain(engine)
    assert (engine.counters().reused_tokens, backend.num_prompt_rows) == (0, 600)
    seqs += [engine.add(prompt, params) for params in salted]
    drain(engine)
    assert [seq.num_reused for seq in seqs] == [0, 0, 0, 192, 192, 192]
    assert engine.counters().prefix_hits == 3


def test_without_room_for_kept_prompts_each_is_computed_as_a_whole() -> None:
    engine, backend = fake_engine(4, 0, 200, 100)
    seqs = run(engine, [[7] * 200] * 3)
    assert [seq.num_reused for seq in seqs] == [0, 0, 0]
    assert backend.num_prompt_rows == 600


def test_a_prompt_that_comes_beside_another_waits_for_what_they_have_in_common() -> None:
    engine, backend = fake_engine(8, 40, 256, 64)
    seqs = run(engine, [[7] * 200 + [8 + i] for i in range(8)])
    assert backend.num_prompt_rows == 192 + 8 * 9
    assert [seq.num_reused for seq in seqs] == [0] + [192] * 7


def test_a_prompt_whose_logits_are_no_numbers_leaves_nothing_to_others() -> None:
    engine, backend = fake_engine(1, 40, 256, 64)
    inner, spoilt = backend.run, [7] * 200

    def spoil(step: Step) -> npt.NDArray[np.float32]:
        logits = inner(step)
        if step.chunks[0].seq.token_ids[:200] == spoilt:
            logits[:] = np.nan
        return logits

    backend.run = spoil  # type: ignore[method-assign]
    (seq,) = run(engine, [spoilt])
    assert seq.finish_reason == "error"
    backend.run = inner  # type: ignore[method-assign]
    (seq,) = run(engine, [spoilt])
    assert (seq.finish_reason, seq.num_reused) == ("length", 0)
    (seq,) = run(engine, [spoilt])
    assert (seq.finish_reason, seq.num_reused) == ("length", 192)
