"""A step that is launched before the last one's tokens are known changes nothing but the time.

The fake runner reads the packed arrays as the device does, and derives logits from all tokens of a
sequence and nothing else. Its tokens must be those of the engine that waits for every step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_runtime.backends.fake import Fake
from llama_runtime.chunk import Chunk
from llama_runtime.contract import MIN_CHUNK, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError, CaravanError
from llama_runtime.events import TokenEvent
from llama_runtime.paged_cache import PagedCache
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence, TokenLogprob
from llama_runtime.slots_engine import slots_engine
from tests.paged_engine import POISON, WatchedPaged, paged_engine

VOCAB_SIZE, MAX_LEN, BLOCK_SIZE = 97, 128, 4
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB_SIZE]
BYTE_LEVEL = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
END_TOKENS = frozenset({2, 3, 4, 5})  # so that one sequence in a few ends early
MOST_BLOCKS = MAX_LEN // BLOCK_SIZE
NUM_SCHEDULES = 10  # of each case


class Told(NamedTuple):
    """All that a caller learns of a sequence."""

    token_ids: list[int]
    text: str
    reason: str | None
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob | None]


@dataclass(frozen=True)
class Request:
    """A prompt and its parameters, hashable, so that its run alone is computed once."""

    prompt: tuple[int, ...]
    params: SamplingParams
    sample: int = 0

    @cache  # noqa: B019 - requests live as long as the tests
    def alone(self) -> Told:
        """What the engine that waits for every step makes of it."""
        engine = slots_engine(
            Fake(1, cache_capacity(MAX_LEN, MIN_CHUNK), VOCAB_SIZE),
            TABLE,
            END_TOKENS,
            vocab_size=VOCAB_SIZE,
            max_batch=1,
            max_len=MAX_LEN,
            prompt_budget=MIN_CHUNK,
            max_chunk=MIN_CHUNK,
        )
        seq = engine.add(self.prompt, self.params, sample=self.sample)
        text = ""
        while engine.has_work:
            text += "".join(event.text for event in engine.step())
        return told(seq, text)


def told(seq: Sequence, text: str) -> Told:
    reason = seq.finish_reason
    return Told(seq.completion_token_ids, text, reason, seq.logprobs, seq.prompt_logprobs)


class Watch:
    """An engine that overlaps, and everything that it has told."""

    def __init__(
        self,
        *,
        max_batch: int = 4,
        num_blocks: int = 4 * MOST_BLOCKS,
        prompt_budget: int = 64,
        max_chunk: int = 48,
        share_prefixes: bool = True,
        end_tokens: frozenset[int] = END_TOKENS,
    ) -> None:
        self.engine: Engine
        self.runner: WatchedPaged
        self.cache: PagedCache
        self.engine, self.runner, self.cache = paged_engine(
            TABLE,
            end_tokens,
            vocab_size=VOCAB_SIZE,
            max_batch=max_batch,
            max_len=MAX_LEN,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            prompt_budget=prompt_budget,
            max_chunk=max_chunk,
            share_prefixes=share_prefixes,
        )
        self.requests: dict[int, Request] = {}
        self.sequences: dict[int, Sequence] = {}
        self.events: dict[int, list[TokenEvent]] = {}

    def add(self, request: Request) -> Sequence:
        seq = self.engine.add(request.prompt, request.params, sample=request.sample)
        self.requests[seq.id], self.sequences[seq.id] = request, seq
        self.events[seq.id] = []
        return seq

    def step(self) -> list[TokenEvent]:
        return self.hear(self.engine.step)

    def hear(self, step: Callable[[], list[TokenEvent]]) -> list[TokenEvent]:
        ended = {i for i, told in self.events.items() if told and told[-1].finish_reason}
        ended |= {seq.id for seq in self.sequences.values() if seq.finish_reason == "abort"}
        # More than one is in flight after an interrupt, or by hand.
        leaving = self.leaving() if len(self.engine._in_flight) < 2 else []
        try:
            events = step()
        except KeyboardInterrupt:
            events = []
        else:
            # A forward that was in flight has been collected, and the next was without them.
            assert all(seq.slot is None for seq in leaving)
        self.check()
        for event in events:
            assert event.sequence_id not in ended
            self.events[event.sequence_id].append(event)
        return events

    def check(self) -> None:
        self.engine.check()
        self.cache.check()
        live = [seq for seq in self.sequences.values() if seq.finish_reason is None]
        assert self.engine.has_work >= bool(live or self.leaving())
        for seq in self.sequences.values():
            num_tokens = seq.num_completion_tokens
            # One that is queued and isn't needed any more is all that is wasted. After an error
            # there may be one more, which was no number or never came back, and after an interrupt
            # two are queued.
            queued = 2 if self.runner.num_interrupts else 1
            most = num_tokens + queued + (seq.finish_reason == "error")
            assert num_tokens <= self.runner.rows[seq.id] <= min(seq.params.max_tokens, most)

    def leaving(self) -> list[Sequence]:
        """Who has ended and isn't gone."""
        seqs = self.sequences.values()
        return [seq for seq in seqs if seq.finish_reason is not None and seq.slot is not None]

    def drain(self) -> None:
        steps_left = 20 + sum(
            len(request.prompt) + request.params.max_tokens for request in self.requests.values()
        )
        while self.engine.has_work:
            assert steps_left + self.runner.num_interrupts > 0, "a sequence starves"
            steps_left -= 1
            self.step()
        self.is_idle()
        assert self.step() == []

    def is_idle(self) -> None:
        self.is_free()
        assert all(seq.num_pending == 0 for seq in self.sequences.values())

    def is_free(self) -> None:
        self.check()
        assert not self.engine.has_work
        assert self.engine.ready
        assert self.cache.num_free == self.cache.num_slots
        assert self.cache.num_free_blocks == self.cache.num_blocks
        assert all(seq.slot is None for seq in self.sequences.values())

    def told(self, seq: Sequence) -> Told:
        events = self.events[seq.id]
        assert [event.token_id for event in events] == seq.completion_token_ids
        if seq.params.logprobs:
            assert [event.logprob for event in events] == seq.logprobs
        return told(seq, "".join(event.text for event in events))

    def ends_as_alone(self, *seqs: Sequence) -> None:
        for seq in seqs:
            assert self.told(seq) == self.requests[seq.id].alone()
            if seq.finish_reason == "length":  # nothing was queued in vain
                assert self.runner.rows[seq.id] == seq.params.max_tokens


def random_request(rng: random.Random) -> Request:
    max_tokens = rng.choice([1, 2, 3, 8, 20])
    # Few beginnings, so that some share blocks.
    first, length = rng.randrange(3), min(rng.choice([1, 2, 3, 9, 33, 100]), MAX_LEN - max_tokens)
    length = rng.randint(max(1, length // 2), length)
    prompt = [(first + 7 * i) % VOCAB_SIZE for i in range(length)]
    if rng.random() < 0.3:
        prompt[-1] = rng.randrange(VOCAB_SIZE)
    samples = rng.choice([1, 1, 3])
    params = SamplingParams(
        max_tokens=max_tokens,
        # Their inverses are exact in float32, so no draw lies differently by a rounding.
        temperature=rng.choice([0.0, 0.5, 4.0]),
        top_k=rng.choice([0, 0, 5]),
        top_p=rng.choice([1.0, 0.75]),
        min_p=rng.choice([0.0, 0.125]),
        seed=rng.randrange(4),
        n=samples,
        stop=tuple(rng.sample(["A", "q", "0", "xy", "#!", "~"], rng.choice([0, 0, 1, 3]))),
        include_stop=rng.random() < 0.5,
        stop_token_ids=frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 4]))),
        ignore_eos=rng.random() < 0.4,
        logprobs=rng.random() < 0.25,
        prompt_logprobs=rng.random() < 0.15,
    )
    return Request(tuple(prompt), params, rng.randrange(samples))


def schedule(seed: int, *, share_prefixes: bool) -> Watch:
    """Sequences that come, go and are given up at random, in little memory."""
    rng = random.Random(seed)
    watch = Watch(
        max_batch=rng.choice([1, 2, 3, 5, 9]),
        num_blocks=rng.choice([MOST_BLOCKS, MOST_BLOCKS + 8, 4 * MOST_BLOCKS]),
        prompt_budget=rng.choice([3, 16, 64]),
        max_chunk=rng.choice([3, 48]),
        share_prefixes=share_prefixes,
    )
    aborted: set[int] = set()
    arrivals = [random_request(rng) for _ in range(rng.randint(1, 12))]
    while arrivals:
        for _ in range(rng.randint(1, 4)):
            if arrivals:
                watch.add(arrivals.pop())
        for _ in range(rng.choice([0, 1, 1, 2, 6])):
            watch.step()
        live = [seq.id for seq in watch.sequences.values() if seq.finish_reason is None]
        if live and rng.random() < 0.3:
            aborted.add(rng.choice(live))
            watch.engine.abort(max(aborted & set(live)))
            watch.check()
            aborted &= {seq.id for seq in watch.sequences.values() if seq.finish_reason == "abort"}
    watch.drain()
    for seq in watch.sequences.values():
        alone = watch.requests[seq.id].alone()
        if seq.id in aborted:
            assert seq.finish_reason == "abort"
            seen = watch.told(seq)
            assert seen.token_ids == alone.token_ids[: len(seen.token_ids)]
            assert seen.logprobs == alone.logprobs[: len(seen.logprobs)]
            assert alone.text.startswith(seen.text)
        else:
            watch.ends_as_alone(seq)
    assert watch.engine.num_failed_steps == 0
    return watch


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["apart", "sharing"])
@pytest.mark.parametrize("case", range(10))
def test_the_overlap_does_not_show(case: int, share_prefixes: bool) -> None:
    reasons, shared = set(), 0
    for seed in range(case * NUM_SCHEDULES, (case + 1) * NUM_SCHEDULES):
        watch = schedule(seed, share_prefixes=share_prefixes)
        reasons |= {seq.finish_reason for seq in watch.sequences.values()}
        shared += watch.cache.num_reused_tokens
    assert reasons == {"stop", "length", "abort"}
    assert (shared > 0) == share_prefixes


# --- one thing at a time ------------------------------------------------------------------------


def plain(prompt: list[int], max_tokens: int, **params: object) -> Request:
    """Greedy, and no end token ends it."""
    return Request(
        tuple(prompt),
        SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params),  # type: ignore[arg-type]
    )


def stopping(prompt: list[int], num_tokens: int) -> Request:
    """One that stops with the given token of many, by a token that hasn't come before."""
    tokens = plain(prompt, 20).alone().token_ids
    assert tokens[num_tokens - 1] not in tokens[: num_tokens - 1]
    return plain(prompt, 20, stop_token_ids=frozenset({tokens[num_tokens - 1]}))


def test_the_first_step_tells_nothing_and_the_next_one_what_it_came_to() -> None:
    watch = Watch()
    assert watch.step() == []
    assert watch.runner.num_launched == 0
    seq = watch.add(plain([7, 8, 9], 3))
    assert watch.step() == []
    assert (watch.runner.num_launched, seq.num_pending, seq.completion_token_ids) == (1, 1, [])
    (event,) = watch.step()
    assert event.token_id == seq.completion_token_ids[0]
    assert (watch.runner.num_launched, seq.num_pending) == (2, 1)
    watch.drain()
    watch.ends_as_alone(seq)
    assert watch.runner.num_launched == 3


def test_ready_is_that_of_the_step_in_flight() -> None:
    watch = Watch()
    watch.add(plain([7, 8, 9], 2))
    told = []
    for _ in range(4):
        for ready in (False, True):
            watch.runner.ready = ready
            told.append(watch.engine.ready)
        watch.step()
    # Nothing is in flight before the first step and after the third.
    assert told == [True, True, False, True, False, True, True, True]


def test_there_is_room_while_a_slot_is_free_and_nobody_waits() -> None:
    watch = Watch(max_batch=2, num_blocks=2 * MOST_BLOCKS)
    room = [watch.engine.has_room]
    for first in (1, 2):
        watch.add(plain([first], 4))
        room.append(watch.engine.has_room)
        watch.step()
        room.append(watch.engine.has_room)
    assert room == [True, False, True, False, False]
    watch.drain()
    assert watch.engine.has_room


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_what_stopped_while_its_next_row_was_queued_gets_nothing_of_it(num_tokens: int) -> None:
    watch = Watch()
    seq = watch.add(stopping([7, 8, 9], num_tokens))
    watch.drain()
    watch.ends_as_alone(seq)
    assert (seq.finish_reason, seq.num_completion_tokens) == ("stop", num_tokens)
    assert watch.runner.rows[seq.id] == num_tokens + 1


@pytest.mark.parametrize("share_prefixes", [False, True], ids=["apart", "sharing"])
def test_its_slot_and_its_blocks_are_given_when_its_late_row_is_collected(
    share_prefixes: bool,
) -> None:
    late, newcomer = stopping([7, 8, 9, 10, 11], 3), plain([7, 8, 9, 10, 12], 20)
    num_blocks = -(-(5 + 20) // BLOCK_SIZE)
    watch = Watch(max_batch=1, num_blocks=num_blocks, share_prefixes=share_prefixes)
    first, second = watch.add(late), watch.add(newcomer)
    while first.finish_reason is None:
        blocks = watch.cache.table(first) if first.slot is not None else []
        watch.step()
    assert (first.num_pending, first.slot, second.slot) == (1, 0, None)
    assert sorted(watch.cache.table(first)) == sorted(blocks)
    launched = watch.runner.num_launched
    assert watch.step() == []  # the late row is collected
    assert (first.num_pending, first.slot, second.slot) == (0, None, None)
    assert watch.cache.num_free_blocks == num_blocks
    assert watch.runner.num_launched == launched
    assert watch.step() == []  # the newcomer's step is launched
    assert (first.slot, second.slot) == (None, 0)
    assert sorted(watch.cache.table(second)) == sorted(blocks)
    watch.drain()
    watch.ends_as_alone(first, second)


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
@pytest.mark.parametrize("length", [1, 2, 4, 5, 50, 100])
def test_no_row_is_queued_past_the_last_token(length: int, max_tokens: int) -> None:
    watch = Watch()
    seqs = [watch.add(plain([i] * length, max_tokens)) for i in range(6)]
    watch.drain()
    watch.ends_as_alone(*seqs)
    assert all(watch.runner.rows[seq.id] == max_tokens for seq in seqs)


def test_an_abort_while_a_step_is_in_flight_ends_at_once() -> None:
    watch = Watch(max_batch=1)
    seq, other = watch.add(plain([7, 8, 9], 9)), watch.add(plain([7, 8, 10], 9))
    watch.step()
    watch.step()
    watch.engine.abort(seq.id)
    assert (seq.finish_reason, seq.slot, seq.num_pending) == ("abort", 0, 1)
    assert (watch.engine.num_running, watch.engine.num_waiting) == (0, 1)
    watch.check()
    assert watch.step() == []
    assert (seq.slot, seq.num_pending, other.slot) == (None, 0, None)
    watch.step()
    assert other.slot == 0
    watch.drain()
    watch.ends_as_alone(other)
    assert watch.told(seq).token_ids == watch.requests[seq.id].alone().token_ids[:1]


def test_one_of_whom_nothing_is_in_flight_is_gone_at_once() -> None:
    watch = Watch(max_batch=2, prompt_budget=8)
    waits_for_a_step = watch.add(plain([7] * 40, 9))  # of which its prompt takes five
    watch.engine.abort(waits_for_a_step.id)
    watch.is_idle()
    decodes, reads = watch.add(plain([7, 8, 9], 9)), watch.add(plain([8] * 40, 9))
    watch.step()
    in_flight = []
    for _ in range(4):  # steps of prompts and of what decodes take turns
        watch.step()
        (flight,) = watch.engine._in_flight
        in_flight.append([chunk.seq.id for chunk in flight.chunks])
    assert in_flight == [[decodes.id], [reads.id]] * 2
    watch.engine.abort(decodes.id)
    assert decodes.slot is None
    watch.engine.abort(reads.id)
    assert reads.slot is not None
    assert watch.engine.has_work
    watch.drain()


def test_one_that_is_in_the_older_of_two_forwards_leaves_with_it() -> None:
    watch = Watch(max_batch=2, prompt_budget=8)
    decodes, reads = watch.add(plain([*PREFIX[:7], 1], 9)), watch.add(plain([8] * 40, 9))
    watch.runner.spoils = lambda chunk: chunk.seq is decodes and chunk.seq.draw_index == 1
    watch.step()
    while decodes.draw_index < 2:
        watch.step()
    blocks = watch.cache.table(decodes)
    assert watch.engine.launch()
    assert [chunk.seq for chunk in watch.engine._in_flight[-1].chunks] == [reads]
    assert (watch.runner.cells == POISON).any()
    watch.engine.abort(decodes.id)
    assert watch.leaving() == [decodes]
    watch.check()
    watch.hear(watch.engine.collect)
    assert watch.leaving() == []
    assert (watch.runner.cells.reshape(-1, BLOCK_SIZE)[blocks] == -1).all()
    later = watch.add(plain([*PREFIX[:7], 2], 9))
    watch.runner.spoils = lambda _: False
    watch.drain()
    assert watch.cache.num_reused_tokens == 0
    watch.ends_as_alone(reads, later)


def test_whoever_comes_while_a_late_row_is_in_flight_is_served() -> None:
    watch = Watch(max_batch=1)
    first = watch.add(stopping([7, 8, 9], 2))
    while first.finish_reason is None:
        watch.step()
    assert watch.engine.has_work
    assert (watch.engine.num_running, watch.engine.num_waiting) == (0, 0)
    second = watch.add(plain([7, 8, 9], 4))
    watch.drain()
    watch.ends_as_alone(first, second)


# --- faults -------------------------------------------------------------------------------------


PREFIX = [11, 12, 13, 14, 15, 16, 17, 18]  # fills two blocks


def test_a_row_that_is_no_number_ends_its_own_sequence() -> None:
    watch = Watch()
    victim, *others = (watch.add(plain([i, *PREFIX], 8)) for i in range(3))
    watch.runner.spoils = lambda chunk: chunk.seq is victim and chunk.seq.draw_index == 2
    while victim.finish_reason is None:
        blocks = watch.cache.table(victim) if victim.slot is not None else []
        watch.step()
    assert (victim.finish_reason, victim.num_completion_tokens) == ("error", 2)
    assert isinstance(watch.events[victim.id].pop().error, BackendError)
    assert len(blocks) == 5
    cells = watch.runner.cells.reshape(-1, BLOCK_SIZE)
    assert (cells[blocks] == -1).all()
    watch.drain()
    watch.ends_as_alone(*others)
    assert watch.engine.failure is None


def test_its_blocks_are_shared_with_nobody_who_comes_later() -> None:
    watch = Watch()
    victim = watch.add(plain([*PREFIX, 1], 8))
    watch.runner.spoils = lambda chunk: chunk.seq is victim
    while victim.finish_reason is None:
        watch.step()
    later = watch.add(plain([*PREFIX, 2], 8))
    watch.drain()
    assert watch.cache.num_reused_tokens == 0
    watch.ends_as_alone(later)


@pytest.mark.parametrize("ends", ["stop", "abort"])
@pytest.mark.parametrize("share_prefixes", [False, True], ids=["apart", "sharing"])
def test_a_late_row_that_is_no_number_leaves_nothing_to_who_comes_next(
    ends: str, share_prefixes: bool
) -> None:
    late = stopping([*PREFIX, 1], 3) if ends == "stop" else plain([*PREFIX, 1], 20)
    num_blocks = -(-(len(PREFIX) + 1 + 20) // BLOCK_SIZE)
    watch = Watch(max_batch=1, num_blocks=num_blocks, share_prefixes=share_prefixes)
    first, second = watch.add(late), watch.add(plain([*PREFIX, 2], 20))
    watch.runner.spoils = lambda chunk: chunk.seq is first and chunk.seq.draw_index == 3
    while first.num_completion_tokens < 3:
        watch.step()
    watch.engine.abort(first.id)
    assert (first.finish_reason, first.slot, first.num_pending) == (ends, 0, 1)
    blocks = watch.cache.table(first)
    assert len(blocks) == num_blocks
    assert (watch.runner.cells == POISON).any()
    watch.step()
    assert (first.finish_reason, first.slot) == (ends, None)
    assert (watch.runner.cells == -1).all()
    watch.step()
    assert sorted(watch.cache.table(second)) == sorted(blocks)
    watch.drain()
    assert watch.cache.num_reused_tokens == 0
    watch.ends_as_alone(second, *([first] if ends == "stop" else []))
    assert watch.engine.failure is None


def test_without_a_fault_the_prefix_of_one_that_left_is_shared() -> None:
    watch = Watch(max_batch=1)
    first, second = watch.add(stopping([*PREFIX, 1], 3)), watch.add(plain([*PREFIX, 2], 20))
    watch.drain()
    assert watch.cache.num_reused_tokens == len(PREFIX)
    watch.ends_as_alone(first, second)


def test_a_row_behind_one_that_is_no_number_is_cleaned_too() -> None:
    watch = Watch(max_batch=1)
    victim, other = watch.add(plain([*PREFIX, 1], 20)), watch.add(plain([*PREFIX, 2], 20))
    watch.runner.spoils = lambda chunk: chunk.seq is victim and chunk.seq.draw_index == 2
    while victim.finish_reason is None:
        watch.step()
    assert (victim.finish_reason, victim.slot) == ("error", 0)
    watch.step()
    assert victim.slot is None
    assert (watch.runner.cells == -1).all()
    watch.drain()
    watch.ends_as_alone(other)


def test_if_a_late_row_cannot_be_cleaned_the_engine_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(max_batch=1)
    first, second = watch.add(stopping([*PREFIX, 1], 3)), watch.add(plain([*PREFIX, 2], 20))
    watch.runner.spoils = lambda chunk: chunk.seq is first and chunk.seq.draw_index == 3

    def fails(_: Sequence) -> None:
        raise BackendError("it can't be cleaned")

    monkeypatch.setattr(watch.runner, "clean", fails)
    while first.finish_reason is None:
        watch.step()
    (event,) = watch.step()
    assert (event.sequence_id, str(event.error)) == (second.id, "it can't be cleaned")
    assert watch.engine.failure is event.error
    watch.is_free()


def test_blocks_that_another_shares_already_stay_as_they_are() -> None:
    watch = Watch()
    victim = watch.add(plain([*PREFIX, 1], 8))
    watch.step()
    other = watch.add(plain([*PREFIX, 2], 8))
    watch.runner.spoils = lambda chunk: chunk.seq is victim and chunk.seq.draw_index == 3
    watch.drain()
    assert watch.cache.num_reused_tokens == len(PREFIX)
    assert victim.finish_reason == "error"
    watch.ends_as_alone(other)


@pytest.mark.parametrize("launch", range(1, 7))
def test_a_launch_that_raises_ends_its_culprit_alone(launch: int) -> None:
    watch = Watch()
    seqs = [watch.add(plain([*PREFIX[: 2 + i], i], 6)) for i in range(3)]
    victim = seqs[1]
    runner = watch.runner
    runner.refuses = lambda chunks: (
        runner.num_launched >= launch and any(chunk.seq is victim for chunk in chunks)
    )
    watch.drain()
    assert victim.finish_reason == "error"
    assert watch.events[victim.id].pop().error is not None
    seen, alone = watch.told(victim).token_ids, watch.requests[victim.id].alone().token_ids
    assert seen == alone[: len(seen)] == alone[: launch - 1]  # all that was launched before
    watch.ends_as_alone(seqs[0], seqs[2])
    assert watch.engine.failure is None
    assert watch.engine.num_failed_steps == 1


@pytest.mark.parametrize("launch", range(1, 7))
def test_a_launch_that_raises_once_harms_nobody(launch: int) -> None:
    watch = Watch()
    seqs = [watch.add(plain([i, *PREFIX], 6)) for i in range(3)]
    watch.runner.refuses = lambda _: watch.runner.num_launched == launch
    watch.drain()
    watch.ends_as_alone(*seqs)
    assert watch.engine.num_failed_steps == 1


def test_one_is_not_blamed_because_its_neighbour_stopped_meanwhile() -> None:
    watch = Watch()
    stops, goes_on = watch.add(stopping([7, 8, 9], 2)), watch.add(plain([7, 8, 10], 6))
    # The step that raises holds a late row, and whoever is left did nothing wrong alone.
    watch.runner.refuses = lambda chunks: len(chunks) == 2 and watch.runner.num_launched == 3
    watch.drain()
    watch.ends_as_alone(stops, goes_on)


def test_nobody_is_blamed_if_all_of_a_launch_that_raised_have_stopped() -> None:
    watch = Watch()
    stops = watch.add(stopping([7, 8, 9], 2))
    watch.runner.refuses = lambda _: watch.runner.num_launched == 3
    watch.drain()
    watch.ends_as_alone(stops)
    # The next one to be at fault is the first, so the engine goes on.
    culprit = watch.add(plain([1, 2, 3], 6))
    watch.runner.refuses = lambda chunks: any(chunk.seq is culprit for chunk in chunks)
    watch.drain()
    assert culprit.finish_reason == "error"
    assert watch.engine.failure is None


@pytest.mark.parametrize("launch", range(1, 6))
def test_a_result_that_raises_ends_everything(launch: int) -> None:
    watch = Watch(max_batch=2)
    seqs = [watch.add(plain([7, 8, i], 9)) for i in range(4)]
    watch.runner.breaks = lambda: watch.runner.num_launched >= launch
    for _ in range(launch):
        assert watch.engine.failure is None
        watch.step()
    events = watch.step()
    assert sorted(event.sequence_id for event in events) == [seq.id for seq in seqs]
    assert {event.finish_reason for event in events} == {"error"}
    assert {str(event.error) for event in events} == {"the device is lost"}
    assert watch.engine.failure is not None
    assert not watch.engine.has_work
    watch.runner.ready = False
    assert watch.engine.ready  # a device that is lost is not asked any more
    assert watch.step() == []
    assert watch.cache.num_free_blocks == watch.cache.num_blocks
    with pytest.raises(BackendError, match="the engine has stopped: the device is lost"):
        watch.engine.add([1], SamplingParams(max_tokens=1))
    watch.engine.close()


def faulty_schedule(seed: int, *, interrupts: bool) -> int:
    """Rows that are no numbers, launches that raise and maybe interrupts, at random.

    Returns:
        How many sequences faults end.
    """
    rng = random.Random(seed)
    watch = Watch(max_batch=rng.choice([2, 5, 9]), num_blocks=2 * MOST_BLOCKS)
    spoiled = {rng.randrange(12): rng.randrange(6) for _ in range(3)}
    start, blamed = rng.randrange(20), set()

    def refuses(chunks: Seq[Chunk]) -> bool:
        fails = watch.runner.num_launched % 20 == start  # not those that run alone then
        if fails and len(chunks) == 1:
            blamed.add(chunks[0].seq.id)
        return fails

    watch.runner.refuses = refuses
    watch.runner.spoils = lambda chunk: spoiled.get(chunk.seq.id) == chunk.seq.draw_index
    watch.runner.interrupts = lambda: interrupts and rng.random() < 0.2
    aborted = set[int]()
    for _ in range(12):
        watch.add(random_request(rng))
        for _ in range(rng.choice([0, 1, 2])):
            watch.step()
        if rng.random() < 0.2:
            live = [seq.id for seq in watch.sequences.values() if seq.finish_reason is None]
            aborted |= set(live[:1])
            watch.engine.abort(min(live, default=99))
            watch.check()
    watch.drain()
    assert watch.engine.failure is None
    assert all(watch.sequences[i].finish_reason == "abort" for i in aborted)
    ended = [seq for seq in watch.sequences.values() if seq.finish_reason == "error"]
    for seq in watch.sequences.values():
        if seq not in ended and seq.id not in aborted:
            watch.ends_as_alone(seq)
    for seq in ended:
        assert seq.id in blamed or spoiled[seq.id] == seq.num_completion_tokens
        assert watch.events[seq.id].pop().token_id is None
        seen, alone = watch.told(seq).token_ids, watch.requests[seq.id].alone().token_ids
        assert seen == alone[: len(seen)]
    return len(ended)


@pytest.mark.parametrize("interrupts", [False, True], ids=["in peace", "interrupted"])
@pytest.mark.parametrize("case", range(8))
def test_faults_at_random_end_nobody_else(case: int, interrupts: bool) -> None:
    seeds = range(case * NUM_SCHEDULES, (case + 1) * NUM_SCHEDULES)
    num_ended = sum(faulty_schedule(seed, interrupts=interrupts) for seed in seeds)
    assert num_ended > NUM_SCHEDULES


def test_a_result_that_raises_while_some_leave_frees_all() -> None:
    watch = Watch(max_batch=2)
    aborted, stops, waits = (watch.add(plain([7, 8, i], 9)) for i in range(3))
    watch.step()
    watch.runner.breaks = lambda: True
    watch.step()
    watch.engine.abort(aborted.id)
    assert aborted.slot == 0
    events = watch.step()
    assert {event.sequence_id for event in events} == {stops.id, waits.id}
    assert {str(event.error) for event in events} == {"the device is lost"}
    watch.is_free()


def test_a_result_that_raises_while_a_launch_is_isolated_ends_everything() -> None:
    watch = Watch(max_batch=3)
    seqs = [watch.add(plain([7, 8, i], 9)) for i in range(3)]
    watch.runner.refuses = lambda chunks: len(chunks) == 3 and watch.runner.num_launched == 3
    watch.runner.breaks = lambda: watch.runner.num_launched == 5  # the second one alone
    for _ in range(4):
        watch.step()
    assert [seq.finish_reason for seq in seqs] == ["error"] * 3
    assert {str(watch.events[seq.id].pop().error) for seq in seqs} == {"the device is lost"}
    assert str(watch.engine.failure) == "the device is lost"
    # What the first one came to was told.
    assert [watch.told(seq).token_ids for seq in seqs] == [
        watch.requests[seq.id].alone().token_ids[: 3 - (seq is not seqs[0])] for seq in seqs
    ]
    assert not watch.engine.has_work
    assert watch.cache.num_free_blocks == watch.cache.num_blocks


# --- interrupts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2, 5])
@pytest.mark.parametrize("at", range(1, 7))
def test_an_interrupt_while_a_step_is_waited_for_loses_nothing(at: int, times: int) -> None:
    watch = Watch(max_batch=2)
    seqs = [watch.add(plain([7, 8, i], 5)) for i in range(3)]
    seqs += [watch.add(stopping([7, 8, 9], 3))]
    runner = watch.runner
    runner.interrupts = lambda: runner.num_launched >= at and runner.num_interrupts < times
    watch.drain()
    assert runner.num_interrupts == times
    watch.ends_as_alone(*seqs)


def test_an_interrupt_reaches_whoever_steps() -> None:
    watch = Watch()
    seq = watch.add(plain([7, 8, 9], 3))
    watch.step()
    watch.runner.interrupts = lambda: True
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            watch.engine.step()
        watch.check()
    assert watch.runner.num_launched == 2  # and no more are queued behind them
    watch.runner.interrupts = lambda: False
    watch.drain()
    watch.ends_as_alone(seq)


def test_who_is_given_up_at_an_interrupt_leaves_all_the_same() -> None:
    watch = Watch(max_batch=2)
    seqs = [watch.add(plain([7, 8, i], 5)) for i in range(2)]
    watch.step()
    watch.runner.interrupts = lambda: watch.runner.num_interrupts < 1
    watch.step()
    for seq in seqs:
        watch.engine.abort(seq.id)
    assert [seq.slot for seq in seqs] == [0, 1]
    later = watch.add(plain([7, 8, 9], 5))
    launched = watch.runner.num_launched
    watch.hear(watch.engine.collect)
    assert [seq.slot for seq in seqs] == [0, 1]  # both forwards hold them
    watch.hear(watch.engine.collect)
    assert [seq.slot for seq in seqs] == [None, None]
    assert watch.runner.num_launched == launched
    watch.drain()
    watch.ends_as_alone(later)


def interrupted_isolation(*, launching: bool = False) -> tuple[Watch, list[Sequence]]:
    """One has its last token of a launch that was refused, and at another an interrupt came."""
    watch = Watch(max_batch=2)
    seqs = [watch.add(plain([7, 8, i], 2 + i)) for i in range(2)]
    runner = watch.runner

    def refuses(chunks: Seq[Chunk]) -> bool:
        if launching and runner.num_launched == 4:
            raise KeyboardInterrupt
        return len(chunks) == 2 and runner.num_launched == 2

    runner.refuses = refuses
    runner.interrupts = lambda: runner.num_launched == 4 and runner.num_interrupts < 1
    watch.step()
    with pytest.raises(KeyboardInterrupt):
        watch.engine.step()
    watch.check()
    assert [seq.num_completion_tokens for seq in seqs] == [2, 1]
    assert seqs[0].finish_reason == "length"
    return watch, seqs


def test_an_interrupt_while_a_launch_is_isolated_loses_nothing() -> None:
    watch, seqs = interrupted_isolation()
    watch.drain()
    watch.ends_as_alone(*seqs)


def test_nothing_is_told_of_one_that_is_given_up_before_it_is_told() -> None:
    watch, seqs = interrupted_isolation()
    for seq in seqs:
        watch.engine.abort(seq.id)
    watch.drain()
    assert watch.events == {seq.id: [] for seq in seqs}


def test_an_event_that_is_not_told_yet_is_work() -> None:
    watch, (first, second) = interrupted_isolation(launching=True)
    watch.engine.abort(second.id)
    assert not watch.leaving()
    watch.drain()
    watch.ends_as_alone(first)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_closing_with_a_step_in_flight_ends_all_of_it(num_steps: int) -> None:
    watch = Watch(max_batch=2)
    seqs = [watch.add(plain([7, 8, i], 9)) for i in range(3)]
    for _ in range(num_steps):
        watch.step()
    watch.engine.abort(seqs[0].id)
    assert (seqs[0].slot is None) == (num_steps == 0)
    watch.engine.close()
    watch.engine.close()
    assert watch.runner.num_closes == 1
    assert not watch.engine.has_work
    assert {seq.finish_reason for seq in seqs} == {"abort"}
    assert watch.engine.ready
    watch.engine.check()
    assert watch.step() == []
    assert watch.cache.num_free_blocks == watch.cache.num_blocks
    assert watch.cache.num_free == watch.cache.num_slots
    with pytest.raises(CaravanError, match="closed"):
        watch.engine.add([1], SamplingParams(max_tokens=1))


def test_what_the_fake_cannot_do_ends_its_own_sequence() -> None:
    watch = Watch()
    biased, other = watch.add(plain([1], 4, logit_bias={3: 1.0})), watch.add(plain([2], 4))
    watch.drain()
    assert biased.finish_reason == "error"
    watch.ends_as_alone(other)
