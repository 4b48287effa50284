"""A group by hand: who gets a sequence, which engine is stepped, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import pytest

from llama_runtime.admission import Accepted, Message
from llama_runtime.engine_group import EngineGroup
from llama_runtime.errors import BackendError, CapacityError, CaravanError, RequestError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.shared_engine import Inbox, SharedEngine
from llama_runtime.worker import Worker
from tests.overlapping_runner import LAUNCHING, MAX_LEN, VOCAB_SIZE, Clock, Overlapping, engines
from tests.watched_backend import PATIENCE, wait_for


class Setup:
    """A group, its engines and their runners by name."""

    def __init__(self, sizes: Seq[int], *, overlaps: bool = True) -> None:
        self.engines, self.runners, self.log = engines(sizes, overlaps=overlaps)
        self.group = EngineGroup(self.engines)
        self.events: list[TokenEvent] = []

    def add(self, count: int, max_tokens: int = 5) -> list[Sequence]:
        return [self.group.add([7, i], unending(max_tokens)) for i in range(count)]

    def step(self) -> list[str]:
        """What a step did."""
        self.log.clear()
        self.events += self.group.step()
        self.group.check()
        return list(self.log)

    def drain(self) -> list[TokenEvent]:
        """Every event so far, when nothing is left."""
        while self.group.has_work:
            self.step()
        return self.events

    @property
    def running(self) -> list[int]:
        return [engine.num_running for engine in self.engines]


def unending(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)


def asleep(*runners: Overlapping) -> None:
    """Have steps last until they are released."""
    for runner in runners:
        runner.polls = None


# --- who gets what ------------------------------------------------------------------------------


def test_engines_of_any_size_fill_evenly() -> None:
    setup = Setup([2, 4, 6])
    setup.add(6)
    setup.step()
    assert setup.running == [1, 2, 3]
    setup.add(6)
    setup.step()
    assert setup.running == [2, 4, 6]
    setup.add(1)
    setup.step()
    assert (setup.group.num_waiting, setup.group.num_running) == (1, 12)


def test_slots_are_given_in_order_of_arrival() -> None:
    setup = Setup([1, 2])
    seqs = setup.add(8, max_tokens=3)
    while setup.group.has_work:
        setup.step()
        waits = [seq.slot is None for seq in seqs if seq.finish_reason is None]
        assert waits == sorted(waits)


def test_all_free_slots_are_given_in_one_step() -> None:
    setup = Setup([4, 4])
    setup.add(9)
    assert setup.group.num_waiting == 9
    setup.step()
    assert (setup.group.num_waiting, setup.running) == (1, [4, 4])


def test_a_slot_that_is_freed_at_a_busy_engine_is_given_all_the_same() -> None:
    setup = Setup([2, 2])
    seqs = setup.add(5, max_tokens=20)
    asleep(*setup.runners)
    setup.step()
    setup.group.abort(seqs[1].id)
    setup.runners[1].release()
    assert setup.step() == ["a launches", "b launches", "b collects"]
    assert seqs[1].slot is None  # the forward that held it is over; the next was without it
    setup.runners[0].release()
    setup.step()
    assert (setup.group.num_waiting, setup.running) == (0, [2, 2])
    assert not setup.engines[1].ready


def test_a_slot_that_is_leaving_is_given_one_step_after_its_last_forward() -> None:
    setup = Setup([1])
    asleep(*setup.runners)
    first, second = setup.add(2, max_tokens=20)
    for _ in range(3):
        setup.step()
    setup.group.abort(first.id)
    assert (setup.group.num_running, setup.group.num_waiting, second.slot) == (0, 1, None)
    assert setup.step() == ["a waits"]
    assert (first.slot, second.slot) == (None, None)
    assert setup.step() == ["a launches"]
    assert second.slot == 0
    setup.drain()
    assert second.num_completion_tokens == 20


def test_a_group_works_until_all_that_leave_have_left() -> None:
    setup = Setup([2, 2])
    asleep(*setup.runners)
    seqs = setup.add(4, max_tokens=20)
    setup.step()
    setup.step()
    for seq in seqs:
        setup.group.abort(seq.id)
    assert (setup.group.num_running, setup.group.has_work) == (0, True)
    assert {seq.slot for seq in seqs} == {0, 1}
    setup.drain()
    assert {seq.slot for seq in seqs} == {None}
    assert setup.events[2:] == []  # two by the first engine's first step
    assert [runner.num_launched for runner in setup.runners] == [2, 2]


def test_an_idle_engine_comes_before_a_busy_one_and_one_that_is_ready_before_both() -> None:
    setup = Setup([4, 4, 4])
    asleep(*setup.runners)
    seqs = setup.add(3)
    setup.step()
    setup.group.abort(seqs[0].id)
    setup.group.abort(seqs[1].id)
    setup.runners[1].release()  # both are idle, but a step of nobody's still runs at the first
    (last,) = setup.add(1)
    assert setup.group.ready
    assert setup.step() == ["b launches", "c launches", "b collects"]
    assert (setup.running, last.slot) == ([0, 1, 1], 1)  # beside the one that leaves


def test_one_that_does_not_fit_holds_back_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup([2, 2])
    large, small = setup.add(2)
    first, second = (engine._cache for engine in setup.engines)
    for cache in (first, second):
        monkeypatch.setattr(cache, "fits", lambda seq: seq is not large)
    setup.step()
    assert (large.slot, small.slot, setup.group.num_waiting) == (None, None, 2)
    monkeypatch.setattr(second, "fits", lambda _: True)
    setup.step()
    assert setup.engines[1]._scheduler.running == [large]
    assert setup.engines[0]._scheduler.running == [small]


# --- which engine is stepped --------------------------------------------------------------------


def test_every_engine_is_launched_before_any_is_waited_for() -> None:
    setup = Setup([2, 2, 2])
    asleep(*setup.runners)
    setup.add(6)
    assert setup.step() == ["a launches", "b launches", "c launches"]
    assert setup.events == []


LAUNCHES = ["a launches", "b launches", "c launches"]


def test_only_engines_that_are_ready_are_collected_from() -> None:
    setup = Setup([2, 2, 2])
    asleep(*setup.runners)
    setup.add(6)
    setup.step()
    setup.runners[2].release()
    setup.runners[1].release()
    assert setup.group.ready
    assert setup.step() == [*LAUNCHES, "b collects", "c collects"]


def test_where_none_is_ready_the_one_collected_longest_ago_is_waited_for() -> None:
    setup = Setup([2, 2, 2])
    asleep(*setup.runners)
    setup.add(6, max_tokens=50)
    setup.step()
    setup.runners[0].release()
    assert setup.step() == [*LAUNCHES, "a collects"]
    assert not setup.group.ready
    assert setup.step() == ["a launches", "b waits"]
    waits = [setup.step() for _ in range(6)]
    # Whoever was collected has its next one queued before another is waited for.
    assert waits == [
        [f"{a} launches", f"{b} waits"] for a, b in zip("bcabca", "cabcab", strict=True)
    ]


def test_nobody_is_waited_for_while_an_engine_has_only_begun() -> None:
    setup = Setup([1, 1])
    asleep(*setup.runners)
    setup.add(1, max_tokens=50)
    assert setup.step() == ["a launches"]
    assert setup.step() == ["a launches", "a waits"]
    setup.add(1, max_tokens=50)
    assert setup.group.ready
    assert sorted(setup.step()) == ["a launches", "b launches"]
    assert setup.step() == ["b launches", "b waits"]  # which was collected from before the others


def on_a_clock(setup: Setup, lengths: Seq[float]) -> Clock:
    clock = Clock()
    for runner, length in zip(setup.runners, lengths, strict=True):
        runner.clock, runner.length = clock, length
    return clock


@pytest.mark.parametrize("lengths", [[1], [1] * 2, [1] * 6, [1, 1.5], [3, 1, 2], [10, 1]], ids=str)
def test_no_queue_is_empty_while_one_is_waited_for(lengths: list[float]) -> None:
    setup = Setup([2] * len(lengths))
    clock = on_a_clock(setup, lengths)
    setup.add(2 * len(lengths), max_tokens=100)
    num_waits = 0
    for _ in range(60):
        waited = [line[0] for line in setup.step() if line.endswith("waits")]
        num_waits += len(waited)
        for runner in setup.runners if waited else ():
            assert len(runner.flights) == 1 + (runner.name not in waited)
    assert num_waits > 15
    setup.drain()
    assert [runner.num_launched for runner in setup.runners] == [100] * len(lengths)
    # Nothing holds up the slowest, so nobody else either in the end.
    assert clock.now == pytest.approx(100 * max(lengths), abs=7 * LAUNCHING)


@pytest.mark.parametrize("num_engines", [1, 2, 6])
def test_engines_of_one_pace_are_never_idle(num_engines: int) -> None:
    setup = Setup([2] * num_engines)
    on_a_clock(setup, [1] * num_engines)
    setup.add(2 * num_engines, max_tokens=40)
    setup.drain()
    assert [runner.gaps for runner in setup.runners] == [[0] * 39] * num_engines


@pytest.mark.parametrize("late", [0, 1, 2])
def test_an_engine_that_gets_work_later_has_a_queue_at_once(late: int) -> None:
    setup = Setup([1, 1, 1])
    on_a_clock(setup, [1, 1, 1])
    setup.add(late, max_tokens=30)
    for _ in range(5):
        setup.step()
    setup.add(3 - late, max_tokens=30)
    setup.drain()
    assert [runner.gaps for runner in setup.runners] == [[0] * 29] * 3


def test_a_far_slower_engine_costs_the_others_no_more_than_its_own_time() -> None:
    setup = Setup([1, 1])
    on_a_clock(setup, [10, 1])
    setup.add(2, max_tokens=40)
    setup.drain()
    slow, fast = setup.runners
    assert slow.gaps == [0] * 39
    # Two are queued whenever the slow one is waited for.
    assert fast.free_at <= 40 / 2 * 10 + 1


def test_an_engine_that_takes_long_holds_nobody_up_and_is_not_forgotten() -> None:
    setup = Setup([1, 1])
    slow, _ = setup.runners
    asleep(slow)
    setup.add(2, max_tokens=20)
    setup.step()
    assert setup.step() == ["a launches", "b launches", "b collects"]
    for _ in range(10):
        assert setup.step() == ["b launches", "b collects"]
    slow.release()
    assert "a collects" in setup.step()


def test_an_engine_without_work_is_not_stepped() -> None:
    setup = Setup([2, 2])
    assert setup.step() == []
    setup.add(1)
    assert setup.step() == ["a launches"]


def test_readiness_and_room_are_those_of_the_next_step() -> None:
    setup = Setup([1, 1])
    group = setup.group
    assert (group.ready, group.has_room, group.has_work) == (True, True, False)
    asleep(*setup.runners)
    setup.add(1)
    setup.step()
    assert (group.ready, group.has_room, group.has_work) == (False, True, True)
    setup.add(1)
    assert (group.ready, group.has_room) == (True, False)  # the other engine begins at once
    setup.step()
    assert (group.ready, group.has_room) == (False, False)
    setup.runners[1].release()
    assert group.ready


# --- adding and ending --------------------------------------------------------------------------


def test_what_is_wrong_is_refused_as_by_an_engine() -> None:
    group = Setup([1, 1]).group
    assert group.max_len == MAX_LEN
    with pytest.raises(CapacityError):
        group.add([1] * MAX_LEN, unending(1))
    with pytest.raises(RequestError, match="must lie in 0 to 96"):
        group.add([VOCAB_SIZE], unending(1))
    with pytest.raises(RequestError, match="sample must lie in 0 to 1"):
        group.add([1], unending(1, n=2), sample=2)
    assert not group.has_work


def test_engines_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="engines of one max_len"):
        EngineGroup([])
    one, other = engines([1])[0] + engines([1])[0]
    other.max_len -= 1
    with pytest.raises(ValueError, match=r"one max_len, not of \[159, 160\]"):
        EngineGroup([one, other])


def test_engines_that_number_for_themselves_are_refused_before_they_mix_sequences_up() -> None:
    group = EngineGroup(engines([1])[0] + engines([1])[0])
    group.add([1], unending(9))
    group.step()
    group.step()
    with pytest.raises(ValueError, match="must share their ids"):
        group.add([1], unending(9))


def test_aborting_ends_a_sequence_wherever_it_is() -> None:
    setup = Setup([1, 1])
    first, second, third, fourth = setup.add(4)
    setup.step()
    for seq, slot in ((second, 0), (third, None)):
        setup.group.abort(seq.id)
        setup.group.check()
        assert (seq.finish_reason, seq.slot) == ("abort", slot)
    assert (setup.group.num_waiting, setup.running) == (1, [1, 0])
    setup.group.abort(99)
    events = setup.drain()
    assert second.slot is None
    setup.group.abort(first.id)
    assert {event.sequence_id for event in events} == {first.id, fourth.id}
    assert (first.finish_reason, fourth.finish_reason) == ("length", "length")


def test_closing_ends_what_runs_and_waits_and_closes_every_engine_once() -> None:
    setup = Setup([1, 1])
    asleep(*setup.runners)
    seqs = setup.add(4)
    setup.step()
    setup.group.close()
    setup.group.close()
    assert [seq.finish_reason for seq in seqs] == ["abort"] * 4
    assert [seq.slot for seq in seqs] == [None] * 4
    setup.group.check()
    assert not setup.group.has_work
    assert [runner.num_closes for runner in setup.runners] == [1, 1]
    assert setup.group.closed
    assert setup.step() == []
    with pytest.raises(CaravanError, match="the engine is closed"):
        setup.group.add([1], unending(1))


@pytest.mark.parametrize("bad", [{0}, {2}, {0, 1, 2}])
def test_an_engine_that_can_not_be_closed_leaves_no_other_open(bad: set[int]) -> None:
    setup = Setup([1, 1, 1])
    setup.add(5)
    setup.step()
    for index in bad:
        setup.runners[index].closing_fails = True
    with pytest.raises(BackendError, match="can't be closed"):
        setup.group.close()
    assert [runner.num_closes for runner in setup.runners] == [1, 1, 1]
    setup.group.close()
    assert [runner.num_closes for runner in setup.runners] == [1, 1, 1]


# --- failures -----------------------------------------------------------------------------------


def errors(events: list[TokenEvent]) -> dict[int, str]:
    return {one.sequence_id: str(one.error) for one in events if one.finish_reason == "error"}


def test_an_engine_that_fails_ends_its_own_and_the_others_run_the_rest() -> None:
    setup = Setup([2, 2])
    seqs = setup.add(10)
    setup.runners[0].fails_after = 2
    events = setup.drain()
    struck = [seqs[0], seqs[2]]
    assert errors(events) == {seq.id: "a failed" for seq in struck}
    ends = [event for event in events if event.finish_reason]
    assert sorted(event.sequence_id for event in ends) == [seq.id for seq in seqs]
    assert all(seq.num_completion_tokens == 5 for seq in seqs if seq not in struck)
    assert setup.group.failure is None
    assert setup.runners[0].num_launched == 4  # one more while the third runs, and then none
    (after,) = setup.add(1)
    setup.drain()
    assert after.finish_reason == "length"


def test_when_the_last_engine_fails_what_waits_ends_with_its_error() -> None:
    setup = Setup([1, 1])
    seqs = [setup.group.add([7], unending(5, n=2), sample=i % 2) for i in range(6)]
    setup.runners[1].fails_after = 1
    setup.runners[0].fails_after = 3
    while setup.group.failure is None:
        setup.step()
    found = errors(setup.events)
    assert found == {seq.id: "b failed" if seq is seqs[1] else "a failed" for seq in seqs}
    waited = [one for one in setup.events if one.error and one.sequence_id > 1]
    assert [one.sample for one in waited] == [0, 1, 0, 1]
    assert [seq.finish_reason for seq in seqs] == ["error"] * 6
    assert str(setup.group.failure) == "a failed"
    assert not setup.group.has_work
    assert setup.step() == []
    with pytest.raises(BackendError, match="the engine has stopped: a failed"):
        setup.group.add([1], unending(1))


def test_failed_forwards_of_all_engines_are_counted() -> None:
    setup = Setup([2, 2], overlaps=False)
    setup.add(4)
    for runner in setup.runners:
        runner.refuses = True
    setup.drain()
    assert [engine.num_failed_steps for engine in setup.engines] == [1, 1]
    assert setup.group.num_failed_steps == 2
    assert str(setup.group.failure) == "b refuses"


def test_a_failure_frees_what_leaves() -> None:
    setup = Setup([2, 1])
    seqs = setup.add(3)
    for runner in setup.runners:
        runner.fails_after = 1
    setup.step()
    setup.step()
    setup.group.abort(seqs[0].id)
    assert seqs[0].slot == 0
    setup.drain()
    assert [seq.finish_reason for seq in seqs] == ["abort", "error", "error"]
    assert [seq.slot for seq in seqs] == [None] * 3


# --- interrupts ---------------------------------------------------------------------------------


def test_what_one_engine_came_to_is_told_after_an_interrupt_at_another() -> None:
    setup = Setup([1, 1])
    first, second = setup.add(2, max_tokens=1)
    setup.step()
    setup.runners[1].interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        setup.group.step()
    assert (first.finish_reason, setup.group.has_work) == ("length", True)
    assert [event.sequence_id for event in setup.drain()] == [first.id, second.id]


def test_nothing_is_told_of_who_is_given_up_after_an_interrupt() -> None:
    setup = Setup([1, 1])
    seqs = setup.add(2, max_tokens=1)
    setup.step()
    setup.runners[1].interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        setup.group.step()
    for seq in seqs:
        setup.group.abort(seq.id)
    assert setup.drain() == []


# --- under what runs it -------------------------------------------------------------------------


def test_threads_may_share_a_group() -> None:
    setup = Setup([1, 1])
    shared, inbox = SharedEngine(setup.group), Inbox()
    seqs = [seq for i in range(4) for seq in shared.add([7, i], unending(3), inbox)]
    assert (shared.stats().running, shared.stats().waiting) == (0, 4)
    while shared.stats().finished < 4:
        shared.wait(inbox)
        inbox.clear()
    assert all(seq.num_completion_tokens == 3 for seq in seqs)
    setup.runners[0].fails_after = 0
    dead = shared.add([7], unending(3), inbox)[0]
    shared.wait(inbox)
    assert (dead.finish_reason, shared.failed) == ("error", False)
    shared.close()
    assert [runner.num_closes for runner in setup.runners] == [1, 1]


def test_a_worker_may_run_a_group_and_goes_on_when_an_engine_fails() -> None:
    setup = Setup([1, 1])
    setup.runners[0].fails_after = 1
    worker = Worker(setup.group, max_queued_requests=9, max_queued_tokens=99)
    mailboxes: list[list[Message]] = [[] for _ in range(6)]
    for i, mailbox in enumerate(mailboxes):
        worker.submit(worker.admit(deliver_to(mailbox)), [7, i], unending(4))
    wait_for(lambda: worker.stats().finished == 6)
    wait_for(lambda: all(mailbox for mailbox in mailboxes))
    ends = [mailbox[-1] for mailbox in mailboxes]
    reasons = [end.finish_reason for end in ends if isinstance(end, TokenEvent)]
    assert sorted(reason or "" for reason in reasons) == ["error"] + ["length"] * 5
    assert all(isinstance(mailbox[0], Accepted) for mailbox in mailboxes)
    assert worker.stats().running == worker.stats().waiting == 0
    worker.close()
    worker.join(PATIENCE)
    assert [runner.num_closes for runner in setup.runners] == [1, 1]


def deliver_to(mailbox: list[Message]) -> Any:
    def deliver(message: Message) -> bool:
        mailbox.append(message)
        return True

    return deliver


# --- check --------------------------------------------------------------------------------------


def test_check_finds_a_sequence_that_its_engine_has_lost() -> None:
    setup = Setup([1, 1])
    setup.add(2)
    setup.step()
    setup.engines[1].abort(1)
    with pytest.raises(RuntimeError, match="holds 0 sequences, not 1"):
        setup.group.check()


def test_check_finds_a_sequence_in_two_places() -> None:
    setup = Setup([1, 1])
    seqs = setup.add(3)
    setup.step()
    setup.group._waiting.add(seqs[0])
    with pytest.raises(RuntimeError, match=r"sequences wait that run or ended: \[0\]"):
        setup.group.check()


def test_check_asks_every_engine() -> None:
    setup = Setup([1, 1])
    setup.add(2)
    setup.step()
    setup.engines[1]._sequences.clear()
    with pytest.raises(RuntimeError, match="0 sequences, but 1 wait or run"):
        setup.group.check()
