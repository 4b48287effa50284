"""Who gets the next slot: by arrival, priority, deadline, and what each caller holds."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tokenizers import Tokenizer, decoders, models

from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.waiting import AGEING, WaitingQueue

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)


def sequence(
    arrived: float,
    priority: int = 0,
    *,
    caller: object = None,
    deadline: float | None = None,
) -> Sequence:
    """One that arrived at some time; its deadline is a time too."""
    params = SamplingParams(priority=priority)
    seq = Sequence(0, [1], 1, params, 0, Detokenizer(TABLE))
    seq.arrived, seq.deadline = arrived, deadline
    seq.caller = caller
    return seq


def queue_of(*seqs: Sequence) -> WaitingQueue:
    queue = WaitingQueue()
    for seq in seqs:
        queue.add(seq)
    return queue


def drained(queue: WaitingQueue, now: float = 1000.0) -> list[Sequence]:
    """All that wait, as they get slots that are given back at once."""
    order = []
    while (seq := queue.first()) is not None:
        queue.grant(seq, now)
        queue.release(seq)
        order.append(seq)
    return order


def test_equals_go_in_order_of_arrival() -> None:
    seqs = [sequence(5.0) for _ in range(20)]
    assert drained(queue_of(*seqs)) == seqs


def test_a_lower_priority_goes_first() -> None:
    late, usual, urgent = sequence(1, 1), sequence(2), sequence(3, -1)
    assert drained(queue_of(late, usual, urgent)) == [urgent, usual, late]


@pytest.mark.parametrize("levels", [1, 3, 100])
def test_whoever_has_waited_long_enough_goes_before_any_priority(levels: int) -> None:
    old = sequence(0, levels)
    young = sequence(AGEING * levels + 0.1, 0)
    too_young = sequence(AGEING * levels - 0.1, 0)
    assert drained(queue_of(old, young)) == [old, young]
    assert drained(queue_of(old, too_young)) == [too_young, old]


def test_a_deadline_that_comes_near_goes_before_what_has_time() -> None:
    patient, pressed = sequence(0, 5), sequence(1, 5, deadline=20.0)
    assert drained(queue_of(patient, pressed)) == [pressed, patient]
    distant = sequence(1, 5, deadline=1e6)
    assert drained(queue_of(patient, distant)) == [patient, distant]


def test_those_whose_deadline_has_passed_are_named_once() -> None:
    first, second, third = (sequence(0, deadline=at) for at in (3.0, 1.0, 2.0))
    queue = queue_of(first, second, third, sequence(0))
    queue.remove(third)
    assert queue.late(0.9) == []
    assert queue.late(2.5) == [second]
    queue.remove(second)
    assert queue.late(10) == [first]
    assert queue.late(10) == []


def test_callers_take_turns_whatever_the_length_of_their_queues() -> None:
    many = [sequence(0, caller="many") for _ in range(100)]
    few = [sequence(50, caller="few") for _ in range(3)]
    queue, order, running = queue_of(*many, *few), [], []
    for now in range(100, 112):  # two slots, each given back after a while
        seq = queue.first()
        assert seq is not None
        queue.grant(seq, now)
        running.append(seq)
        order.append(seq.caller)
        if len(running) == 2:
            queue.release(running.pop(0))
    assert order[:6].count("few") == 3
    assert order[6:] == ["many"] * 6


def test_slots_are_shared_evenly_by_those_who_want_them() -> None:
    """One caller holds all of them when the other comes, and has waited for hours."""
    queue = WaitingQueue()
    running = [sequence(0, caller="greedy") for _ in range(16)]
    for seq in running:
        queue.add(seq)
        queue.grant(seq, 0.0)
    for seq in [sequence(0, caller="greedy") for _ in range(500)]:
        queue.add(seq)
    for seq in [sequence(9000, caller="newcomer") for _ in range(500)]:
        queue.add(seq)
    choose, grants = random.Random(0), []
    for now in range(9001, 9101):  # a slot a second
        queue.release(running.pop(choose.randrange(len(running))))
        seq_ = queue.first()
        assert seq_ is not None
        queue.grant(seq_, now)
        running.append(seq_)
        grants.append(seq_.caller)
    assert grants[:10].count("newcomer") >= 8  # until both hold as many
    held = queue.held()
    assert held["greedy"] + held["newcomer"] == 16
    assert min(held["greedy"], held["newcomer"]) >= 7, held


def test_a_priority_counts_between_callers_too() -> None:
    queue = queue_of(sequence(0, caller="a"), sequence(1, -1, caller="b"))
    first = queue.first()
    assert first is not None
    assert first.caller == "b"


@given(st.randoms(use_true_random=False))
def test_nobody_starves(choose: random.Random) -> None:
    """However urgent those are that come all the time, and whoever sends them."""
    queue = WaitingQueue()
    patient = sequence(0, 3, caller="patient")
    queue.add(patient)
    held, now = [sequence(0, caller=i % 3) for i in range(4)], 0.0
    for seq in held:
        queue.grant(seq, 0)
    while patient in queue:
        now += choose.uniform(0, 2)
        assert now < AGEING * (3 + 10 + 4 + 1), "it starves"
        for _ in range(choose.randint(1, 3)):
            urgent = sequence(now, choose.randint(-10, 0), caller=choose.choice([0, 1, 2, "x"]))
            queue.add(urgent)
        queue.release(held.pop(choose.randrange(len(held))))
        first = queue.first()
        assert first is not None
        queue.grant(first, now)
        held.append(first)


def test_thousands_of_callers_cost_little() -> None:
    """Entries that are out of date don't pile up, and callers who have nothing are forgotten."""
    queue = WaitingQueue()
    for i in range(2000):
        seq = sequence(i, caller=i, deadline=1e6)
        queue.add(seq)
        if i % 3:
            queue.remove(seq)
        else:
            queue.grant(seq, i)
            queue.release(seq)
    sizes = len(queue._callers), len(queue._firsts), len(queue._deadlines)
    assert len(queue) == 0
    assert max(sizes) <= 32, sizes


def test_what_one_caller_gives_up_does_not_pile_up_behind_its_first() -> None:
    queue = queue_of(sequence(0, -5))
    for i in range(2000):
        seq = sequence(i)
        queue.add(seq)
        queue.remove(seq)
    assert len(queue._callers[None].queue) <= 4


class Model(RuleBasedStateMachine):
    """The queue against one that looks through everything each time."""

    def __init__(self) -> None:
        super().__init__()
        self.queue, self.now = WaitingQueue(), 0.0
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.granted: dict[Any, float] = {}

    @rule(
        priority=st.integers(-3, 3),
        caller=st.integers(0, 3),
        deadline=st.none() | st.floats(0, 60),
    )
    def add(self, priority: int, caller: int, deadline: float | None) -> None:
        at = None if deadline is None else self.now + deadline
        seq = sequence(self.now, priority, caller=caller, deadline=at)
        self.queue.add(seq)
        self.waiting.append(seq)

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        if self.waiting:
            seq = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
            self.queue.remove(seq)
            self.forget(seq.caller)

    @rule()
    def run(self) -> None:
        if (seq := self.queue.first()) is not None:
            self.queue.grant(seq, self.now)
            self.waiting.remove(seq)
            self.running.append(seq)
            self.granted[seq.caller] = self.now

    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        if self.running:
            seq = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.queue.release(seq)
            self.forget(seq.caller)

    def forget(self, caller: Any) -> None:
        if all(seq.caller != caller for seq in [*self.waiting, *self.running]):
            self.granted.pop(caller, None)

    def due(self, seq: Sequence, *, in_turn: bool) -> float:
        since = max(seq.arrived, self.granted.get(seq.caller, 0.0)) if in_turn else seq.arrived
        due = since + AGEING * seq.params.priority
        due = due if seq.deadline is None else min(due, seq.deadline)
        return due + AGEING * in_turn * sum(seq.caller == other.caller for other in self.running)

    @invariant()
    def the_first_is_the_one_that_is_due_first(self) -> None:
        assert list(self.queue) == self.waiting
        assert self.queue.held() == Counter(seq.caller for seq in self.running)
        firsts = {
            caller: min(
                (seq for seq in self.waiting if seq.caller == caller),
                key=lambda seq: self.due(seq, in_turn=False),
            )
            for caller in {seq.caller for seq in self.waiting}
        }
        order = sorted(
            firsts.values(),
            key=lambda seq: (self.due(seq, in_turn=True), self.waiting.index(seq)),
        )
        assert self.queue.first() is (order[0] if order else None)


TestModel = Model.TestCase
