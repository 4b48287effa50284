"""The size of the batch that is found, on simulated machines."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.batch_sizer import LULL_STEPS, START, TRIAL_STEPS, WINDOW, BatchSizer
from llama_runtime.events import BatchDecision

MOST = 128
Cost = Callable[[int], float]  # milliseconds of a step of so many streams


@dataclass
class Machine:
    """Continuous batching of sequences of 20 to 150 tokens, with steps of known cost.

    Attributes:
        cost: of a step, before noise.
        load: sequences that there are, running and waiting; None for endlessly many.
        noise: by how much of itself a step is slower or faster, as a standard deviation.
        longest: of the sequences.
    """

    cost: Cost
    load: int | None = None
    noise: float = 0.0
    seed: int = 0
    most: int = MOST
    longest: int = 150
    milliseconds: float = 0.0
    tokens: int = 0
    limits: list[int] = field(default_factory=list)
    decisions: list[BatchDecision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizer = BatchSizer(self.most)
        self._random = random.Random(self.seed)
        self._left: list[int] = []

    def run(self, steps: int) -> Machine:
        for _ in range(steps):
            room = min(self.sizer.limit, self.load or self.most)
            begin = min(8, max(0, room - len(self._left)))  # prompts of one step
            self._left += [self._random.randint(20, self.longest) for _ in range(begin)]
            count = len(self._left)
            cost = self.cost(count)
            noisy = cost * max(0.5, self._random.gauss(1, self.noise))
            waits = self.load is None or self.load > self.sizer.limit
            last = self.sizer.decisions[-1] if self.sizer.decisions else None
            self.sizer.observe(count, count, noisy / 1000, waits=waits)
            if self.sizer.decisions and self.sizer.decisions[-1] is not last:
                self.decisions.append(self.sizer.decisions[-1])
            self.milliseconds += cost
            self.tokens += count
            self.limits.append(self.sizer.limit)
            self._left = [left - 1 for left in self._left if left > 1]
        return self

    def to_best(self) -> float:
        """The throughput so far, against that of the best fixed size."""
        best = max(n / self.cost(n) for n in range(1, self.most + 1))
        return self.tokens / self.milliseconds / best


def linear(count: int) -> float:
    return 20 + count


def flat(count: int) -> float:
    """As on a GPU whose steps are bound by reading the weights."""
    return 10 + 0.02 * count


def steep(count: int) -> float:
    """A model so small that little is gained by batching."""
    return 5 + 5 * count


def staircase(count: int) -> float:
    """Steps are padded to powers of two."""
    return 10 + 0.6 * (1 << (count - 1).bit_length())


def knee(count: int) -> float:
    """Beyond 40 it gets slower."""
    return 20 + count + 4 * max(0, count - 40)


def early_knee(count: int) -> float:
    return 20 + count + 4 * max(0, count - 16)


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize(
    ("cost", "asked"),
    [(linear, 0.97), (flat, 0.97), (steep, 0.95), (staircase, 0.97), (knee, 0.95)],
)
def test_the_size_that_is_found_is_nearly_the_best(cost: Cost, asked: float, noise: float) -> None:
    machine = Machine(cost, noise=noise).run(8000)
    assert machine.to_best() >= asked
    assert len(machine.decisions) <= 24  # which is no flapping


def test_sizes_grow_fast_while_requests_wait() -> None:
    machine = Machine(linear).run(100)
    assert machine.limits[-1] == MOST
    assert [decision.limit for decision in machine.decisions] == [64, 128]
    first = machine.decisions[0]
    assert first.reason.startswith("32 -> 64: requests wait; ")
    assert first.reason.endswith(" tokens/s at 32")
    assert machine.limits[first.step] == 64
    assert first.step == 0 or machine.limits[first.step - 1] == START


def test_a_size_that_gives_no_more_is_given_up_and_tried_ever_more_seldom() -> None:
    machine = Machine(early_knee).run(6000)
    up = [d.step for d in machine.decisions if "requests wait" in d.reason and d.limit > START]
    assert 1 <= len(up) <= 3
    back = next(d for d in machine.decisions if d.limit == START)
    assert back.reason.startswith("64 -> 32: ")
    assert " tokens/s at 64, " in back.reason
    assert back.reason.endswith(" at 32")


def test_a_smaller_batch_is_taken_that_gives_as_much() -> None:
    machine = Machine(early_knee).run(6000)
    assert machine.limits[-1] == 16
    assert machine.run(6000).to_best() >= 0.9


def test_where_nothing_is_gained_by_batching_the_batch_gets_small() -> None:
    machine = Machine(lambda count: 5.0 * count).run(6000)
    assert max(machine.limits) == 2 * START  # which was tried
    assert machine.limits[-1] < START


def test_the_knee_is_followed_when_it_moves_down_and_up() -> None:
    machine = Machine(linear).run(3000)
    assert machine.limits[-1] == MOST
    machine.cost = early_knee
    machine.run(3000)
    assert machine.limits[-1] == 16
    machine.cost = linear
    machine.run(6000)  # up to 16 it is as fast as before, so only a trial can tell
    assert machine.limits[-1] == MOST
    assert len(machine.decisions) <= 40


def test_steps_with_fewer_streams_measure_nothing() -> None:
    """Prompts are still running, and their slots don't decode yet."""
    sizer = BatchSizer(MOST)
    for _ in range(10 * WINDOW):
        sizer.observe(START // 2, START // 2, 0.1, waits=True)
    assert sizer.limit == START
    for _ in range(WINDOW):
        assert sizer.limit == START
        sizer.observe(START, START, 0.1, waits=True)
    assert sizer.limit == 2 * START
    for _ in range(TRIAL_STEPS // 2):  # 32 streams are slow, but that isn't what 64 would be
        sizer.observe(START, START, 100.0, waits=True)
        assert sizer.limit == 2 * START


def test_a_burst_of_something_else_on_the_machine_changes_nothing() -> None:
    machine = Machine(linear).run(200)
    assert machine.limits[-1] == MOST
    machine.cost = lambda count: 10 * linear(count)
    before = len(machine.decisions)
    machine.run(WINDOW // 2)
    machine.cost = linear
    machine.run(200)
    assert len(machine.decisions) == before


def test_steps_whose_sequences_have_all_ended_measure_nothing() -> None:
    sizer = BatchSizer(MOST)
    for _ in range(4 * WINDOW):
        sizer.observe(START, 0, 0.1, waits=True)
    assert sizer.limit == START


def test_one_that_waits_now_and_then_is_no_queue() -> None:
    sizer = BatchSizer(MOST)
    for i in range(20 * WINDOW):
        sizer.observe(START, START, 0.1, waits=i % 4 == 0)
    assert sizer.decisions == BatchSizer(MOST).decisions


def test_nobody_waits_so_nothing_is_tried() -> None:
    for load in (1, 3, START):
        assert Machine(linear, load=load, noise=0.1).run(3000).decisions == []


def test_after_a_lull_the_size_shrinks_to_where_it_began() -> None:
    machine = Machine(linear).run(100)
    assert machine.limits[-1] == MOST
    machine.load = 4
    machine.run(4 * LULL_STEPS)
    assert machine.limits[-1] == START
    assert machine.decisions[-1].reason == (
        f"64 -> 32: nobody waited for {LULL_STEPS} steps of at most 4"
    )
    machine.load = None
    machine.run(100)
    assert machine.limits[-1] == MOST


def test_streams_that_use_the_slots_keep_them_though_nobody_waits() -> None:
    machine = Machine(linear).run(100)
    machine.load = MOST
    before = len(machine.decisions)
    machine.run(4 * LULL_STEPS)
    assert len(machine.decisions) == before
    assert machine.limits[-1] == MOST


def test_a_trial_that_endless_sequences_prevent_is_given_up() -> None:
    machine = Machine(linear).run(200)
    machine.longest = 100_000
    machine.run(200)
    before = len(machine.decisions)
    machine.run(3000)
    found = machine.decisions[before:]
    assert any("sequences are too long to try 64" in d.reason for d in found)
    assert machine.limits[-1] == MOST


@pytest.mark.parametrize("most", [1, 2, 3, 20, 100])
def test_no_more_than_memory_allows(most: int) -> None:
    machine = Machine(linear, most=most).run(3000)
    assert max(machine.limits) == most
    assert machine.to_best() >= 0.97


@given(
    most=st.integers(1, 300),
    steps=st.lists(
        st.tuples(
            st.integers(0, 300),
            st.sampled_from([0.0, 1e-6, 0.01, 1.0, 1000.0]),
            st.booleans(),
            st.integers(0, 2),
            st.sampled_from([1, 1, WINDOW, LULL_STEPS, TRIAL_STEPS]),
        ),
        max_size=60,
    ),
)
def test_the_limit_stays_in_its_range_whatever_is_told(
    most: int, steps: list[tuple[int, float, bool, int, int]]
) -> None:
    sizer, again = BatchSizer(most), BatchSizer(most)
    for count, seconds, waits, each, times in steps:
        for _ in range(times):
            full = sizer.limit if count > most else count
            sizer.observe(full, each * full, seconds, waits=waits)
            again.observe(full, each * full, seconds, waits=waits)
            assert 1 <= sizer.limit <= most
    assert list(sizer.decisions) == list(again.decisions)
    assert all(1 <= decision.limit <= most for decision in sizer.decisions)
