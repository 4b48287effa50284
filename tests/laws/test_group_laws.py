"""However many engines there are and however long their steps take, every sequence is as if alone.

The fake backend derives logits from all tokens of a sequence and nothing else, so one that moves
between engines, or gets the events of another, comes out wrong.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from llama_runtime.contract import CHUNK_MULTIPLE
from llama_runtime.engine_group import EngineGroup
from llama_runtime.errors import BackendError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from tests.overlapping_runner import VOCAB_SIZE, engines


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams, sample: int) -> tuple[list[int], str]:
    """Tokens and text of a sequence in an engine of its own that doesn't overlap."""
    ((engine,), _, _) = engines([1], overlaps=False)
    seq, text = engine.add(prompt, params, sample=sample), ""
    while engine.has_work:
        text += "".join(event.text for event in engine.step())
    return seq.completion_token_ids, text


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    length = draw(st.integers(1, 6) | st.sampled_from([32, 33, 66, 130]))
    first = draw(st.integers(0, VOCAB_SIZE - 1))
    return tuple((first + 7 * i) % VOCAB_SIZE for i in range(length))


several_params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 0.7, 5.0]),
    n=st.integers(1, 3),
    seed=st.integers(0, 3),
    ignore_eos=st.booleans(),
)


class Groups(RuleBasedStateMachine):
    """Adds, steps, aborts, slow steps and engines that die, in any order."""

    added: Bundle[Sequence] = Bundle("added")

    def __init__(self) -> None:
        super().__init__()
        self.sequences: dict[int, Sequence] = {}  # in order of arrival
        self.events: dict[int, list[TokenEvent]] = {}

    @initialize(
        sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
        overlaps=st.sampled_from([True, True, False]),
    )
    def start(self, sizes: list[int], overlaps: bool) -> None:
        self.engines, self.runners, self.log = engines(sizes, overlaps=overlaps)
        self.group = EngineGroup(self.engines)
        self.stopped = False

    @precondition(lambda self: self.group.failure is None)
    @rule(target=added, prompt=prompts(), params=several_params, times=st.integers(1, 3))
    def add(self, prompt: tuple[int, ...], params: SamplingParams, times: int) -> Any:
        seqs = [
            self.group.add(prompt, params, sample=sample)
            for _ in range(times)
            for sample in range(params.n)
        ]
        for seq in seqs:
            assert seq.id not in self.sequences
            self.sequences[seq.id], self.events[seq.id] = seq, []
        return multiple(*seqs)

    @precondition(lambda self: self.group.failure is not None)
    @rule()
    def add_to_none(self) -> None:
        with pytest.raises(BackendError, match="the engine has stopped"):
            self.group.add([1], SamplingParams())

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @rule(seq=added)
    def abort(self, seq: Sequence) -> None:
        self.group.abort(seq.id)

    @rule(data=st.data(), polls=st.none() | st.integers(0, 9))
    def steps_take(self, data: st.DataObject, polls: int | None) -> None:
        data.draw(st.sampled_from(self.runners)).polls = polls

    @rule(data=st.data())
    def a_step_is_over(self, data: st.DataObject) -> None:
        runner = data.draw(st.sampled_from(self.runners))
        if any(flight.polls_left != 0 for flight in runner.flights):
            runner.release()

    @rule(data=st.data(), times=st.integers(1, 2))
    def an_interrupt_comes(self, data: st.DataObject, times: int) -> None:
        data.draw(st.sampled_from(self.runners)).interrupts = times

    @rule(data=st.data(), launches=st.integers(0, 9))
    def one_dies(self, data: st.DataObject, launches: int) -> None:
        if data.draw(st.integers(0, 3)) == 0:  # not too often, so that others are left
            runner = data.draw(st.sampled_from(self.runners))
            runner.fails_after = min(runner.fails_after, runner.num_launched + launches)

    @invariant()
    def everything_is_somewhere_once(self) -> None:
        if not hasattr(self, "group"):
            return
        self.group.check()
        live = [seq for seq in self.sequences.values() if seq.finish_reason is None]
        waits = [seq.slot is None for seq in live]
        assert waits == sorted(waits)  # slots are given in order of arrival
        assert self.group.num_waiting == sum(waits)
        assert self.group.num_running == len(live) - sum(waits)
        # Whoever has ended holds its slot just while a forward of it is in flight.
        leaving = self.leaving()
        assert self.group.has_work == bool(live or leaving)
        in_flight = [
            seq for one in self.runners for flight in one.flights for seq in flight.sequences
        ]
        assert all((seq in in_flight) == (seq in leaving) for seq in self.ended())

    def ended(self) -> list[Sequence]:
        return [seq for seq in self.sequences.values() if seq.finish_reason is not None]

    def leaving(self) -> list[Sequence]:
        return [seq for seq in self.ended() if seq.slot is not None]

    def one_step(self) -> None:
        ready, had_work = self.group.ready, self.group.has_work
        num_slots = sum(engine.num_slots for engine in self.engines if engine.failure is None)
        num_slots -= len(self.leaving())
        self.log.clear()
        try:
            events = self.group.step()
        except KeyboardInterrupt:
            assert self.log[-1].endswith("is interrupted")
            return
        assert bool(self.log) == had_work
        num_waits = sum(line.endswith("waits") for line in self.log)
        assert num_waits <= (not ready)
        # Whoever still waits had no slot to take.
        num_ended = sum(event.finish_reason is not None for event in events)
        assert self.group.num_waiting == 0 or self.group.num_running + num_ended >= num_slots
        for event in events:
            past = self.events[event.sequence_id]
            assert not past or past[-1].finish_reason is None
            past.append(event)

    def teardown(self) -> None:
        if not hasattr(self, "group"):
            return
        live = [seq for seq in self.sequences.values() if seq.finish_reason is None]
        num_forwards = sum(
            len(seq.token_ids) // CHUNK_MULTIPLE + 1 + seq.params.max_tokens for seq in live
        )
        # One more for each that is the first at an engine, so that its step is queued and no other.
        num_interrupts = sum(runner.interrupts for runner in self.runners)
        steps_left = 4 * len(self.engines) + num_forwards + len(live) + num_interrupts
        while self.group.has_work:
            assert steps_left > 0, "a sequence starves"
            steps_left -= 1
            self.one_step()
            self.everything_is_somewhere_once()
        assert not self.leaving()
        for seq in self.sequences.values():
            self.ended_well(seq)
        self.group.close()

    def ended_well(self, seq: Sequence) -> None:
        events = self.events[seq.id]
        prompt = tuple(seq.token_ids[: seq.num_prompt_tokens])
        tokens, text = alone(prompt, seq.params, seq.sample)
        found = [event.token_id for event in events if event.token_id is not None]
        assert seq.completion_token_ids == found == tokens[: len(found)]
        assert all(event.sample == seq.sample for event in events)
        if seq.finish_reason == "error":
            (error,) = {event.error for event in events if event.error is not None}
            assert events[-1].error is error
            assert error in [engine.failure for engine in self.engines]
        elif seq.finish_reason != "abort":
            assert events[-1].finish_reason == seq.finish_reason
            assert (found, "".join(event.text for event in events)) == (tokens, text)


TestGroups = Groups.TestCase
TestGroups.settings = settings(
    max_examples=300,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


# --- the same, one difference at a time ---------------------------------------------------------


JOBS = [
    (
        tuple((3 * i + 7 * j) % VOCAB_SIZE for j in range(length)),
        SamplingParams(
            max_tokens=3 + i % 9,
            temperature=(0.0, 0.7, 5.0)[i % 3],
            n=1 + i % 3,
            seed=i % 4,
            ignore_eos=i % 5 > 0,
        ),
    )
    for i, length in enumerate([1, 2, 5, 31, 33, 34, 40, 64, 65, 66, 97, 98, 99, 130, 3, 3] * 2)
]


@pytest.mark.parametrize("overlaps", [False, True], ids=["here and now", "overlapping"])
@pytest.mark.parametrize("sizes", [[1], [3], [1, 1], [4, 4], [1, 2, 5], [2] * 6], ids=str)
def test_the_number_of_engines_and_their_pace_do_not_show(sizes: list[int], overlaps: bool) -> None:
    made, runners, _ = engines(sizes, overlaps=overlaps)
    for i, runner in enumerate(runners):
        runner.polls = 5 * i
    group = EngineGroup(made)
    seqs, texts = [], {}
    for prompt, params in JOBS:
        for sample in range(params.n):
            seqs.append(group.add(prompt, params, sample=sample))
            texts[seqs[-1].id] = ""
    while group.has_work:
        for event in group.step():
            texts[event.sequence_id] += event.text
    expected = [alone(prompt, params, i) for prompt, params in JOBS for i in range(params.n)]
    assert [(seq.completion_token_ids, texts[seq.id]) for seq in seqs] == expected
    assert all(runner.num_launched for runner in runners)


def test_these_laws_can_fail_since_sequences_differ() -> None:
    found = {alone(prompt, params, i)[1] for prompt, params in JOBS for i in range(params.n)}
    assert len(found) > 40
