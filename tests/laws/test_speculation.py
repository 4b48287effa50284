"""Guessing changes how fast tokens come, and nothing else.

On the fake backend, whose logits depend on a sequence's tokens alone, everything that is told with
speculation is what is told without. It derives each row from the tokens that it finds in the cache,
where wrong guesses are written too: one that was read before it is overwritten would change what
comes after it. On the real model a step of several tokens rounds differently, so there the same
holds but for near-ties; and the bits of a speculating sequence, as of any other, are those that it
has alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, pre_tokenizers

from llama_runtime.backends.fake import Fake
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.contract import MAX_DRAFT, MIN_CHUNK, SAMPLER, SLOTS, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_lookup import PromptLookup
from llama_runtime.sequence import Sequence
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from llama_runtime.tokenizer import Tokenizer
from tests.wrapped_backend import Wrapped, digest

# --- on the fake backend: losslessness ----------------------------------------------------------

VOCAB_SIZE, MAX_LEN = 97, 160
END_TOKENS = frozenset({2, 3})
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB_SIZE]
BYTE_LEVEL = HfTokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
SCHEDULES = 120


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    params: SamplingParams

    @cache  # noqa: B019 - requests live as long as the tests
    def told(self) -> Told:
        """What is told of it alone and without speculation."""
        engine = fake_engine(random.Random(0), max_batch=1)
        seq = engine.add(self.prompt, replace(self.params, speculation="off"))
        events = []
        while engine.has_work:
            events += engine.step()
        return Told.of(seq, events)


@dataclass(frozen=True)
class Told:
    """All that a caller learns of a sequence."""

    events: list[tuple[Any, ...]]
    token_ids: list[int]
    reason: str | None
    logprobs: list[Any]
    prompt_logprobs: list[Any]

    @classmethod
    def of(cls, seq: Sequence, events: list[TokenEvent]) -> Told:
        return cls(
            [event[1:] for event in events],
            seq.completion_token_ids,
            seq.finish_reason,
            seq.logprobs,
            seq.prompt_logprobs,
        )


class Oracle(PromptLookup):
    """Knows what will come, and says it with mistakes: the same ones whenever it is asked."""

    def __init__(self, request: Request, seed: int) -> None:
        super().__init__(request.prompt)
        self._truth, self._seed = request.told().token_ids, seed
        self._num_prompt_tokens = len(request.prompt)

    def draft(self, most: int) -> list[int]:
        at = len(self._token_ids) - self._num_prompt_tokens
        choose = random.Random(1000 * self._seed + at)
        length = choose.randint(0, MAX_DRAFT)
        draft = (self._truth[at:] + [1] * MAX_DRAFT)[:length]
        if length and choose.random() < 0.4:
            draft[choose.randrange(length)] = choose.randrange(VOCAB_SIZE)
        return draft[:most]


def fake_engine(choose: random.Random, max_batch: int) -> Engine:
    num_prefix_blocks = choose.choice([0, 0, 6])
    max_chunk = choose.choice([MIN_CHUNK, 64])
    backend = Fake(
        max_batch,
        cache_capacity(MAX_LEN, max_chunk),
        VOCAB_SIZE,
        num_prefix_blocks=num_prefix_blocks,
    )
    return slots_engine(
        backend,
        TABLE,
        END_TOKENS,
        vocab_size=VOCAB_SIZE,
        max_batch=max_batch,
        max_len=MAX_LEN,
        prompt_budget=MIN_CHUNK + choose.choice([0, 50]),
        max_chunk=max_chunk,
        num_prefix_blocks=num_prefix_blocks,
    )


def a_request(choose: random.Random) -> Request:
    """Some say one token or two over and over, so that their own guesses are right."""
    length = choose.choice([1, 2, 5, 8, 31, 33, 34, 66, 98])
    prompt = tuple((choose.randrange(20) + i) % VOCAB_SIZE for i in range(length))
    monotonous = choose.random() < 0.5
    max_tokens = choose.choice([1, 2, 3, 9, 10, 25, 40, MAX_LEN - length])
    scored = choose.random() < 0.4
    params = SamplingParams(
        max_tokens=min(max_tokens, 60),
        min_tokens=choose.choice([0, 0, 1, min(max_tokens, 60) // 2]),
        temperature=choose.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=choose.choice([0, 5]),
        top_p=choose.choice([1.0, 0.8]),
        repetition_penalty=choose.choice([1.0, 1.0, 1.3]),
        presence_penalty=choose.choice([0.0, 0.0, 0.5]),
        frequency_penalty=choose.choice([0.0, 0.0, 0.4]),
        logit_bias=dict.fromkeys(choose.sample(range(5, 40), choose.choice([1, 2])), 60.0)
        if monotonous
        else choose.choice([{}, {7: 2.0}]),
        seed=choose.randrange(5),
        stop=choose.choice([(), (), (LETTERS[11],), (LETTERS[30] + LETTERS[31],)]),
        stop_token_ids=frozenset(choose.choice([(), (), (40, 41)])),
        ignore_eos=choose.random() < 0.5,
        logprobs=scored,
        top_logprobs=choose.choice([0, 2]) if scored else 0,
        prompt_logprobs=choose.random() < 0.2,
        speculation=choose.choice(["on", "on", "off"]),
    )
    return Request(prompt, params)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    choose = random.Random(0)
    return [a_request(choose) for _ in range(60)]


@pytest.mark.parametrize("guesses", ["of an oracle", "of its own"])
def test_what_is_told_is_what_would_be_told_without_speculation(
    requests: list[Request], guesses: str
) -> None:
    drafted = accepted = with_accepted = with_rejected = aborted = 0
    for seed in range(SCHEDULES):
        choose = random.Random(seed)
        engine = fake_engine(choose, max_batch=choose.randint(1, 5))
        waiting = choose.choices(requests, k=choose.randint(2, 9))
        running: list[tuple[Request, Sequence]] = []
        events: dict[int, list[TokenEvent]] = {}
        while waiting or engine.has_work:
            arriving = choose.choice([0, 1, 1, 3]) if engine.has_work else 1
            for request in waiting[:arriving]:
                seq = engine.add(request.prompt, request.params)
                assert (seq.lookup is not None) == (request.params.speculation == "on")
                if seq.lookup is not None and guesses == "of an oracle":
                    seq.lookup = Oracle(request, seed)
                running.append((request, seq))
            del waiting[:arriving]
            for event in engine.step():
                events.setdefault(event.sequence_id, []).append(event)
            engine.check()
            alive = [seq.id for _, seq in running if seq.finish_reason is None]
            if alive and choose.random() < 0.02:
                aborted += 1
                engine.abort(choose.choice(alive))
        for request, seq in running:
            where = f"schedule {seed}, {request}"
            found, expected = Told.of(seq, events.get(seq.id, [])), request.told()
            if found.reason == "abort":
                so_far = len(found.token_ids)
                assert found.token_ids == expected.token_ids[:so_far], where
                assert found.events == expected.events[:so_far], where
                assert found.logprobs == expected.logprobs[:so_far], where
            else:
                assert found == expected, where
        counted = engine.counters()
        drafted, accepted = drafted + counted.drafted_tokens, accepted + counted.accepted_tokens
        with_accepted += counted.accepted_tokens > 0
        with_rejected += counted.accepted_tokens < counted.drafted_tokens
    assert aborted > 0.2 * SCHEDULES
    assert accepted > 0.2 * drafted > SCHEDULES
    assert with_accepted > 0.25 * SCHEDULES
    assert with_rejected > 0.25 * SCHEDULES


def test_the_requests_of_these_laws_end_in_every_way(requests: list[Request]) -> None:
    told = [request.told() for request in requests]
    assert {of_one.reason for of_one in told} == {"stop", "length"}
    assert any(of_one.reason == "length" and len(of_one.token_ids) == 1 for of_one in told)
    ended_by_text = [
        request
        for request, of_one in zip(requests, told, strict=True)
        if of_one.reason == "stop" and of_one.token_ids[-1] not in {*END_TOKENS, 40, 41}
    ]
    assert ended_by_text


# --- on the real model --------------------------------------------------------------------------

REAL_SCHEDULES = {1: 4, 2: 5}  # by number of threads
REAL_MAX_LEN = 90
REAL_TOKENS = 6
NEAR = 1e-3  # logits that differ by less are a tie for kernels that round differently


@dataclass
class Trace:
    """What happened to one sequence: for each step that sampled, its guesses and its rows."""

    steps: list[tuple[tuple[int, ...], tuple[Any, ...]]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


class Recorded(Wrapped):
    """A backend that keeps every row of logits that is sampled, or what `keep` makes of it.

    What lies behind each sequence's tokens is made NaN before every step: whoever reads what a
    wrong guess has left there, or anybody else, shows it.
    """

    def __init__(self, backend: OrtCpu, keep: Callable[[npt.NDArray[np.float32]], Any]) -> None:
        super().__init__(backend)
        self._cache = backend._cache
        self._keep = keep
        self.traces: dict[int, Trace] = {}

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        for chunk in step.chunks:
            start = chunk.seq.cache_len
            for buffer in self._cache:
                buffer[chunk.seq.slot, :, start : start + 2 * MAX_DRAFT] = np.nan
        logits = super().run(step)
        first = 0
        for chunk in step.chunks:
            rows = logits[first : first + chunk.num_sampled]
            first += chunk.num_sampled
            if chunk.samples:
                trace = self.traces.setdefault(chunk.seq.id, Trace())
                trace.steps.append((tuple(chunk.draft), tuple(self._keep(row) for row in rows)))
        return logits


class Runner:
    """Runs requests through one session, with any number of slots."""

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.threads = threads
        self.geometry = bundle.manifest.geometry
        self.tokenizer = Tokenizer(bundle.tokenizer_path)
        self._session: Any = open_session(bundle.graph_path(SLOTS.name), threads)
        self._kernels = OrtSampler(bundle.graph_path(SAMPLER), self.geometry.vocab_size, threads)
        self._row_multiple = OrtCpu(
            self._session, self.geometry, num_slots=1, capacity=2
        ).row_multiple
        self.num_accepted = self.num_drafted = 0

    def run(
        self,
        requests: list[Request],
        slots: int,
        choose: random.Random,
        keep: Callable[[npt.NDArray[np.float32]], Any] = digest,
        abort_one_in: float = 30,
    ) -> list[Trace]:
        """The trace of each request, which come in at any time; some may be aborted."""
        chunk = choose.choice([33, 64])
        backend = OrtCpu(
            self._session,
            self.geometry,
            num_slots=slots,
            capacity=cache_capacity(REAL_MAX_LEN, chunk),
            row_multiple=self._row_multiple,
        )
        recorded = Recorded(backend, keep)
        engine = slots_engine(
            recorded,
            self.tokenizer.byte_table,
            (),
            vocab_size=self.geometry.vocab_size,
            max_batch=slots,
            max_len=REAL_MAX_LEN,
            prompt_budget=choose.choice([33, 100]),
            max_chunk=chunk,
            kernels=self._kernels,
        )
        waiting, seqs = list(requests), []
        while waiting or engine.has_work:
            arriving = choose.choice([0, 1, 2, len(waiting)]) if engine.has_work else 1
            seqs += [engine.add(r.prompt, r.params) for r in waiting[:arriving]]
            del waiting[:arriving]
            engine.step()
            alive = [seq.id for seq in seqs if seq.finish_reason is None]
            if len(requests) > 1 and alive and choose.random() < 1 / abort_one_in:
                engine.abort(choose.choice(alive))
        assert engine.num_failed_steps == 0
        assert all(seq.finish_reason != "error" for seq in seqs)
        engine.check()
        counters = engine.counters()
        self.num_drafted += counters.drafted_tokens
        self.num_accepted += counters.accepted_tokens
        for seq in seqs:
            recorded.traces.setdefault(seq.id, Trace()).token_ids = seq.completion_token_ids
        return [recorded.traces[seq.id] for seq in seqs]


TEXTS = (
    "Item 1: red\nItem 2: red\nItem 3: red\nItem",  # the number is guessed wrong
    "The cat sat on the mat. The dog sat on the mat. The cow sat on the mat. The",
    "a = b[0]\nb = c[0]\nc = d[0]\nd = e[0]\ne = f[0]\nf =",
    "1, 2, 1, 2, 1, 2, 1,",
    "Once upon a time there was a miller who had three sons, a donkey and a cat, and when he died",
    "x",
)


def pool(tokenizer: Tokenizer) -> list[Request]:
    """Texts that go on as they began and one that doesn't, with every kind of sampling."""
    found = []
    for i, text in enumerate([*TEXTS, *TEXTS[:4]]):
        params = SamplingParams(
            max_tokens=REAL_TOKENS,
            temperature=(0.0, 0.0, 0.7)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            frequency_penalty=(0.0, 0.1)[i // 2 % 2],
            seed=i,
            ignore_eos=True,
            speculation="off" if i % 4 == 3 else "on",
        )
        prompt = tokenizer.encode(text) * (1 + (i == 1))
        found.append(Request(tuple(prompt), params))
    return found


@pytest.fixture(scope="module", params=REAL_SCHEDULES, ids=lambda n: f"{n} threads")
def runner(request: pytest.FixtureRequest, real_bundle: Path) -> Runner:
    return Runner(open_bundle(real_bundle, verify="size"), request.param)


def test_company_changes_no_bit_and_no_guess_of_those_that_speculate(runner: Runner) -> None:
    """How much is guessed, and each row that is verified, is what it is alone."""
    requests = pool(runner.tokenizer)
    alone = [runner.run([request], 1, random.Random(0))[0] for request in requests]
    for request, trace in zip(requests, alone, strict=True):
        assert len(trace.token_ids) == REAL_TOKENS
        if request.params.speculation == "on":
            assert sum(len(rows) for _, rows in trace.steps) >= REAL_TOKENS
    runner.num_drafted = runner.num_accepted = 0
    for seed in range(REAL_SCHEDULES[runner.threads]):
        choose = random.Random(1000 * runner.threads + seed)
        members = choose.sample(range(len(requests)), len(requests))
        traces = runner.run([requests[i] for i in members], choose.randint(2, 6), choose)
        for i, trace in zip(members, traces, strict=True):
            where = f"schedule {seed}, {requests[i]}"
            assert trace.steps == alone[i].steps[: len(trace.steps)], where
            assert trace.token_ids == alone[i].token_ids[: len(trace.token_ids)], where
    assert runner.num_accepted > 8 * REAL_SCHEDULES[runner.threads]
    assert runner.num_drafted > runner.num_accepted


def test_greedy_tokens_are_those_without_speculation_but_for_near_ties(runner: Runner) -> None:
    tokens = 25
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    prompts = [tuple(runner.tokenizer.encode(text)) for text in TEXTS]
    slots, choose, never = len(prompts), random.Random(0), float("inf")
    plain = [Request(prompt, params) for prompt in prompts]
    guessing = [replace(request, params=replace(params, speculation="on")) for request in plain]
    without = runner.run(plain, slots, choose, np.copy, never)
    runner.num_accepted = 0
    found = runner.run(guessing, slots, choose, digest, never)
    assert runner.num_accepted > tokens
    for off, on in zip(without, found, strict=True):
        differing = [i for i in range(tokens) if off.token_ids[i] != on.token_ids[i]]
        if differing:
            first = differing[0]
            ((row,),) = [rows for _, rows in off.steps[first : first + 1]]
            difference = row[off.token_ids[first]] - row[on.token_ids[first]]
            assert abs(float(difference)) < NEAR
