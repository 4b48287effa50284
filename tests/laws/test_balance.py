"""Whatever happens in whatever order, slots balance, nobody starves and no neighbour shows.

The fake backend derives logits from all tokens of a sequence and nothing else, so a wrong slot, a
stale length or a shared stream of random numbers changes what is generated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)
from tokenizers import Tokenizer, decoders, models

from llama_runtime.backends.fake import Fake
from llama_runtime.contract import CHUNK_MULTIPLE, MIN_CHUNK, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_lookup import PromptLookup
from llama_runtime.sequence import Sequence
from llama_runtime.slots_engine import slots_engine

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
VOCAB_SIZE, MAX_LEN = 97, 160
END_TOKENS = frozenset({2, 3, 4, 5})  # so that one sequence in a few ends early


@dataclass(frozen=True)
class Limits:
    """How an engine is set up, all of which may only change the time that things take."""

    max_batch: int
    spare_budget: int = 0
    max_chunk: int = MIN_CHUNK
    refill: bool = True
    num_prefix_blocks: int = 0

    def engine(self) -> Engine:
        backend = Fake(
            self.max_batch,
            cache_capacity(MAX_LEN, self.max_chunk),
            VOCAB_SIZE,
            num_prefix_blocks=self.num_prefix_blocks,
        )
        return slots_engine(
            backend,
            TABLE,
            END_TOKENS,
            vocab_size=VOCAB_SIZE,
            max_batch=self.max_batch,
            max_len=MAX_LEN,
            prompt_budget=MIN_CHUNK + self.spare_budget,
            max_chunk=self.max_chunk,
            num_prefix_blocks=self.num_prefix_blocks,
            refill=self.refill,
        )


@dataclass(frozen=True)
class Request:
    """A prompt and its parameters, hashable, so that its run alone is computed once."""

    prompt: tuple[int, ...]
    params: SamplingParams

    @cache  # noqa: B019 - requests live as long as the tests
    def alone(self) -> list[int]:
        """The completion of a run without anybody else, and without guesses."""
        engine = Limits(max_batch=1).engine()
        seq = engine.add(self.prompt, replace(self.params, speculation="off"))
        while engine.has_work:
            engine.step()
        return seq.completion_token_ids

    @property
    def most_steps(self) -> int:
        """Steps it takes if each moves it by as little as is allowed."""
        return len(self.prompt) // CHUNK_MULTIPLE + 1 + self.params.max_tokens


class Guesser(PromptLookup):
    """Guesses what comes, and now and then something else.

    Args:
        seq: whose tokens it guesses.
        tokens: what comes.
    """

    def __init__(self, seq: Sequence, tokens: list[int]) -> None:
        super().__init__(seq.token_ids)
        self.seq, self.tokens = seq, tokens

    def draft(self, most: int) -> list[int]:
        start = self.seq.num_completion_tokens
        wrong = (i % 5 == 3 for i in range(start, len(self.tokens)))
        guesses = [
            (token_id + is_wrong) % VOCAB_SIZE
            for token_id, is_wrong in zip(self.tokens[start:], wrong, strict=True)
        ]
        return guesses[: min(most, start % 4)]


@st.composite
def requests(draw: st.DrawFn) -> Request:
    num_prompt_tokens = draw(st.integers(1, 8) | st.sampled_from([31, 32, 33, 34, 65, 66, 98, 130]))
    first = draw(st.integers(0, 3) | st.integers(0, VOCAB_SIZE - 1))  # so that some begin alike
    prompt = tuple((first + 7 * i) % VOCAB_SIZE for i in range(num_prompt_tokens))
    params = SamplingParams(
        max_tokens=draw(st.integers(1, 12)),
        temperature=draw(st.sampled_from([0.0, 0.7, 5.0])),
        top_k=draw(st.sampled_from([0, 5])),
        top_p=draw(st.sampled_from([0.8, 1.0])),
        seed=draw(st.integers(0, 3)),
        ignore_eos=draw(st.booleans()),
        speculation=draw(st.sampled_from(["off", "on"])),
        priority=draw(st.integers(-2, 2)),
        caller=draw(st.sampled_from([None, "a", "b"])),
        cache_salt=draw(st.sampled_from(["", "", "theirs"])),
    )
    return Request(prompt, params)


limits = st.builds(
    Limits,
    max_batch=st.integers(1, 5),
    spare_budget=st.integers(0, 80),
    max_chunk=st.integers(MIN_CHUNK, 100),
    refill=st.booleans(),
    num_prefix_blocks=st.integers(0, 6),
)


class Balance(RuleBasedStateMachine):
    """Adds, steps and aborts in any order."""

    added: Bundle[Sequence] = Bundle("added")

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[int, Request] = {}
        self.sequences: dict[int, Sequence] = {}
        self.events: dict[int, list[TokenEvent]] = {}
        self.aborted: set[int] = set()
        self.waited: dict[int, int] = {}  # for how many steps each stream got nothing
        self.kinds: set[bool] = set()  # of streams in the step before

    @initialize(chosen=limits)
    def start(self, chosen: Limits) -> None:
        self.engine = chosen.engine()

    @rule(target=added, request=requests())
    def add(self, request: Request) -> Sequence:
        seq = self.engine.add(request.prompt, request.params)
        assert seq.id not in self.sequences
        self.requests[seq.id], self.sequences[seq.id] = request, seq
        self.events[seq.id] = []
        if seq.lookup is not None:
            seq.lookup = Guesser(seq, request.alone())
        return seq

    @rule(target=added, request=requests(), count=st.integers(2, 6))
    def add_several(self, request: Request, count: int) -> Any:
        return multiple(*(self.add(request) for _ in range(count)))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @rule(seq=added)
    def abort(self, seq: Sequence) -> None:
        if seq.finish_reason is None:
            self.aborted.add(seq.id)
        self.engine.abort(seq.id)

    @rule(sequence_id=st.integers(-2, 100))
    def abort_an_id_of_nobody(self, sequence_id: int) -> None:
        if sequence_id not in self.sequences:
            self.engine.abort(sequence_id)

    @invariant()
    def slots_and_lengths_balance(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.check()
        assert self.engine.num_failed_steps == 0
        live = [seq for seq in self.sequences.values() if seq.finish_reason is None]
        assert self.engine.num_waiting + self.engine.num_running == len(live)
        assert self.engine.has_work == bool(live)
        slots = [seq.slot for seq in self.sequences.values() if seq.slot is not None]
        assert len(slots) == len(set(slots)) == self.engine.num_running
        assert all(seq.slot is None for seq in self.sequences.values() if seq.finish_reason)

    def one_step(self) -> None:
        streams = [
            seq
            for seq in self.sequences.values()
            if seq.slot is not None and seq.cache_len >= seq.num_prompt_tokens
        ]
        # A prompt of one token counts as decoding from the start.
        begun = [seq for seq in self.sequences.values() if seq.finish_reason is None]
        kinds = {seq.lookup is None for seq in [*streams, *begun] if seq.decodes}
        before = {seq.id: seq.num_completion_tokens for seq in streams}
        events = self.engine.step()
        served = {event.sequence_id for event in events}
        self.waited = {
            seq.id: 0 if seq.id in served else self.waited.get(seq.id, 0) + 1 for seq in streams
        }
        # No stream waits for more than a step of prompts and one of the other kind of streams.
        most = len(kinds | self.kinds)
        self.kinds = kinds
        assert all(count <= most for count in self.waited.values())
        for seq in streams:
            told = sum(event.sequence_id == seq.id for event in events)
            assert told == seq.num_completion_tokens - before[seq.id] or seq.id in self.aborted
            assert told <= 1 or seq.lookup is not None
        for event in events:
            assert event.sequence_id not in self.aborted
            past = self.events[event.sequence_id]
            assert not past or past[-1].finish_reason is None
            past.append(event)

    def teardown(self) -> None:
        live = [seq.id for seq in self.sequences.values() if seq.finish_reason is None]
        steps_left = sum(self.requests[sequence_id].most_steps for sequence_id in live)
        while live and self.engine.has_work:
            assert steps_left > 0, "a sequence starves"
            steps_left -= 1
            self.one_step()
            self.slots_and_lengths_balance()
        for sequence_id, seq in self.sequences.items():
            tokens = [event.token_id for event in self.events[sequence_id]]
            assert seq.completion_token_ids == tokens
            alone = self.requests[sequence_id].alone()
            if sequence_id in self.aborted:
                assert seq.finish_reason == "abort"
                assert tokens == alone[: len(tokens)]
            else:
                assert seq.finish_reason in ("stop", "length")
                assert tokens == alone


TestBalance = Balance.TestCase
TestBalance.settings = settings(
    max_examples=150,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# --- the same, one difference at a time ---------------------------------------------------------


def pool() -> list[Request]:
    return [
        Request(
            tuple((3 * i + 7 * j) % VOCAB_SIZE for j in range(length)),
            SamplingParams(
                max_tokens=3 + i % 9,
                temperature=(0.0, 0.7, 5.0)[i % 3],
                top_k=(0, 5)[i % 2],
                seed=i % 4,
                ignore_eos=i % 5 > 0,
            ),
        )
        for i, length in enumerate([1, 2, 5, 31, 33, 34, 40, 64, 65, 66, 97, 98, 99, 130, 3, 3])
    ]


def completions(engine: Engine, several: list[Request]) -> list[list[int]]:
    seqs = [engine.add(request.prompt, request.params) for request in several]
    while engine.has_work:
        engine.step()
        engine.check()
    return [seq.completion_token_ids for seq in seqs]


@pytest.mark.parametrize(
    "chosen",
    [
        Limits(1),
        Limits(2),
        Limits(16),
        Limits(64),
        Limits(3, refill=False),
        Limits(5, spare_budget=300),
        Limits(5, max_chunk=128),
        Limits(5, spare_budget=300, max_chunk=512),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "order", [list, lambda several: several[::-1]], ids=["forwards", "backwards"]
)
def test_limits_and_the_order_of_arrival_do_not_show(
    chosen: Limits, order: Callable[[list[Request]], list[Request]]
) -> None:
    several = order(pool())
    assert completions(chosen.engine(), several) == [request.alone() for request in several]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_the_step_of_admission_does_not_show(data: st.DataObject) -> None:
    request = Request((5, 6, 7), SamplingParams(max_tokens=12, temperature=5.0, seed=8))
    engine = Limits(3).engine()
    for other in pool()[: data.draw(st.integers(0, 10))]:
        engine.add(other.prompt, other.params)
    for _ in range(data.draw(st.integers(0, 20))):
        engine.step()
    assert completions(engine, [request]) == [request.alone()]


def test_each_seed_draws_its_own_tokens_whatever_else_is_equal() -> None:
    one = Request((5, 6, 7), SamplingParams(max_tokens=12, temperature=5.0, ignore_eos=True))
    several = [replace(one, params=replace(one.params, seed=seed)) for seed in [*range(8), 3]]
    texts = completions(Limits(4).engine(), several)
    assert texts[8] == texts[3]
    assert len(set(map(tuple, texts))) == 8


def test_the_fake_tells_requests_apart_so_that_these_laws_can_fail() -> None:
    texts = {
        tuple(replace(request, params=replace(request.params, max_tokens=8)).alone())
        for request in pool()
    }
    assert len(texts) >= len(pool()) - 1
