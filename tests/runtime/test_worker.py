"""The thread that owns an engine: who comes in, what everybody is told, and how it ends."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_runtime.admission import Accepted, Message, Ticket
from llama_runtime.errors import (
    BackendError,
    CapacityError,
    CaravanError,
    QueueFullError,
    RequestError,
)
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.worker import Worker
from tests.watched_backend import MAX_LEN, PATIENCE, Watched, wait_for, watched_engine

FIVE = SamplingParams(max_tokens=5)
LONG = SamplingParams(max_tokens=100)


class Caller:
    """Somebody who submits a request and keeps what comes."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.messages: list[Message] = []
        self.threads: set[int] = set()
        self.listens = True
        self.ticket: Ticket = worker.admit(self.deliver)

    def deliver(self, message: Message) -> bool:
        self.messages.append(message)
        self.threads.add(threading.get_ident())
        return self.listens

    def submit(self, prompt: Any, params: Any = FIVE) -> Caller:
        self.worker.submit(self.ticket, prompt, params)
        return self

    @property
    def error(self) -> CaravanError | None:
        last = self.messages[-1] if self.messages else None
        return last if isinstance(last, CaravanError) else None

    @property
    def tokens(self) -> list[int | None]:
        return [one.token_id for one in self.messages if isinstance(one, TokenEvent)]

    @property
    def sequence(self) -> Sequence:
        wait_for(lambda: bool(self.messages))
        first = self.messages[0]
        assert isinstance(first, Accepted)
        return first.sequences[0]

    def wait(self) -> Caller:
        wait_for(lambda: self.ticket.ended)
        return self


@dataclass
class Setup:
    worker: Worker
    backend: Watched

    def ask(self, prompt: Any = (1, 2, 3), params: Any = FIVE) -> Caller:
        return Caller(self.worker).submit(prompt, params)


@pytest.fixture
def two() -> Iterator[Setup]:
    """Two slots, and room for three that wait or twenty of their tokens."""
    engine, backend = watched_engine(max_batch=2)
    worker = Worker(engine, max_queued_requests=3, max_queued_tokens=20)
    yield Setup(worker, backend)
    backend.go_on()
    worker.close()
    worker.join(PATIENCE)
    assert worker.ended.done()
    assert backend.num_closes == 1


def fill(two: Setup, length: int = 1) -> list[Caller]:
    """Requests in both slots, in the middle of a step that hangs."""
    two.backend.hang_after(0)
    running = [two.ask([9] * length, LONG), two.ask([8] * length, LONG)]
    two.backend.wait_until_it_hangs()
    two.backend.hang_after(2)
    two.backend.wait_until_it_hangs()
    assert two.worker.stats().running == 2
    return running


# --- what comes out -----------------------------------------------------------------------------


def test_a_request_is_accepted_and_gets_every_event_in_order(two: Setup) -> None:
    caller = two.ask().wait()
    seq = caller.sequence
    assert caller.tokens == seq.completion_token_ids
    assert len(caller.tokens) == 5
    last = caller.messages[-1]
    assert isinstance(last, TokenEvent)
    assert last.finish_reason == "length"


def test_one_thread_runs_the_engine_and_delivers(two: Setup) -> None:
    callers = [two.ask([i + 1]).wait() for i in range(3)]
    (thread,) = two.backend.threads
    assert thread != threading.get_ident()
    assert [caller.threads for caller in callers] == [{thread}] * 3


def test_requests_of_many_threads_get_what_they_get_alone(two: Setup) -> None:
    prompts = [[i + 1] * (1 + i % 5) for i in range(24)]
    alone = [two.ask(prompt).wait().tokens for prompt in prompts]
    found: dict[int, list[int | None]] = {}

    def ask(numbers: list[int]) -> None:
        for i in numbers:
            while True:
                try:
                    found[i] = two.ask(prompts[i]).wait().tokens
                except QueueFullError:
                    time.sleep(0.001)
                else:
                    break

    threads = [threading.Thread(target=ask, args=([*range(i, 24, 6)],)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [found[i] for i in range(24)] == alone


@pytest.mark.alone
def test_it_sleeps_while_there_is_nothing_to_do(two: Setup) -> None:
    two.ask().wait()
    steps, spent = len(two.backend.steps), time.process_time()
    time.sleep(0.3)
    assert time.process_time() - spent < 0.15
    assert len(two.backend.steps) == steps


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], FIVE, RequestError),
        ([1] * MAX_LEN, FIVE, CapacityError),
        ([10**6], FIVE, RequestError),
        (["a"], FIVE, RequestError),
        ([1], {"max_tokens": 3}, RequestError),
    ],
)
def test_what_the_engine_refuses_is_told_and_leaves_no_trace(
    two: Setup, prompt: Any, params: Any, error: type[CaravanError]
) -> None:
    caller = two.ask(prompt, params).wait()
    assert isinstance(caller.error, error)
    assert len(caller.messages) == 1
    assert (two.worker.stats().waiting, two.worker.stats().running) == (0, 0)
    assert len(two.ask().wait().tokens) == 5


def test_a_prompt_that_raises_when_it_is_read_harms_nobody_else(two: Setup) -> None:
    class Trap:
        def __index__(self) -> int:
            raise OSError("trap")

    other = two.ask(params=LONG)
    caller = two.ask([Trap()]).wait()
    assert isinstance(caller.error, RequestError)
    assert "trap" in str(caller.error)
    assert len(other.wait().tokens) == 100


def test_a_callback_that_raises_or_listens_no_more_ends_its_own_request(
    two: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    def trap(message: Message) -> bool:
        raise KeyError("mine")

    other = two.ask(params=LONG)
    ticket = two.worker.admit(trap)
    two.worker.submit(ticket, [1], LONG)
    wait_for(lambda: ticket.ended)
    deaf = two.ask(params=LONG)
    deaf.listens = False
    deaf.wait()
    assert len(deaf.tokens) < 100
    assert len(other.wait().tokens) == 100
    assert "its callback failed" in caplog.text
    assert two.worker.stats().running == 0


# --- the queue ----------------------------------------------------------------------------------


def test_a_request_too_many_is_refused_at_once_with_the_numbers(two: Setup) -> None:
    fill(two)
    waiting = [two.ask([1, 2]) for _ in range(3)]
    with pytest.raises(QueueFullError) as refusal:
        two.worker.admit(lambda _: True)
    assert str(refusal.value) == (
        "3 requests with 6 prompt tokens wait for a slot, of at most 3 and 20: try again later, or "
        "raise max_queued_requests or max_queued_tokens"
    )
    assert two.worker.stats().waiting == 3
    two.backend.go_on()
    assert [len(caller.wait().tokens) for caller in waiting] == [5, 5, 5]
    assert len(two.ask().wait().tokens) == 5


def test_tokens_that_wait_are_bounded_and_those_that_run_do_not_count(two: Setup) -> None:
    running = fill(two, length=19)
    long = two.ask([1] * 21)  # as nothing waits yet; it is not for ever too large
    with pytest.raises(QueueFullError, match="1 requests with 21 prompt tokens"):
        two.worker.admit(lambda _: True)
    two.backend.go_on()
    assert [len(caller.wait().tokens) for caller in (*running, long)] == [100, 100, 5]


def test_tokens_are_counted_also_where_several_are_admitted_before_their_prompts_are_known(
    two: Setup,
) -> None:
    fill(two)
    first, second = Caller(two.worker), Caller(two.worker)
    first.submit([1] * 20)
    with pytest.raises(QueueFullError, match="1 requests with 20 prompt tokens"):
        second.submit([1])
    two.worker.cancel(second.ticket)
    two.backend.go_on()
    second.wait()
    assert len(first.wait().tokens) == 5
    assert second.messages == []
    assert two.worker.stats().waiting == 0


@pytest.mark.parametrize("submitted", [False, True])
def test_who_is_cancelled_while_waiting_makes_room(two: Setup, submitted: bool) -> None:
    running = fill(two)
    waiting = [Caller(two.worker) for _ in range(3)]
    if submitted:
        for caller in waiting:
            caller.submit([1] * 6)
    two.worker.cancel(waiting[1].ticket)
    two.backend.hang_after(1)
    waiting[1].wait()
    assert two.worker.stats().waiting == 2
    assert waiting[1].tokens == []
    two.ask([1] * 2, FIVE)
    with pytest.raises(QueueFullError):
        two.worker.admit(lambda _: True)
    assert not any(caller.ticket.ended for caller in running)


def test_whatever_happens_the_queue_is_empty_in_the_end(two: Setup) -> None:
    choose = random.Random(3)
    callers: list[Caller] = []
    for _ in range(400):
        try:
            caller = Caller(two.worker)
            callers.append(caller)
            if choose.random() < 0.8:
                tokens = [1] * choose.choice([0, 1, 4, 40, MAX_LEN])
                caller.submit(tokens, SamplingParams(max_tokens=choose.randint(1, 9)))
        except QueueFullError:
            time.sleep(0.001)
        for one in callers[-3:]:
            if choose.random() < 0.3:
                two.worker.cancel(one.ticket)
    for caller in callers:
        if choose.random() < 0.5 or not caller.ticket.num_tokens:
            two.worker.cancel(caller.ticket)
    for caller in callers:
        caller.wait()
    stats, admission = two.worker.stats(), two.worker.admission
    assert (stats.running, stats.waiting) == (0, 0)
    assert (admission._requests, admission._tokens, len(admission._tickets)) == (0, 0, 0)
    assert not two.worker._owners
    assert not two.worker._without_slot
    two.worker._engine.check()


# --- cancelling ---------------------------------------------------------------------------------


def test_a_cancelled_request_runs_in_no_step_after_the_one_under_way(two: Setup) -> None:
    for _ in range(20):
        caller, other = two.ask(params=LONG), two.ask(params=LONG)
        while len(caller.tokens) < 2:
            time.sleep(0.0001)
        since = len(two.backend.steps)
        two.worker.cancel(caller.ticket)
        caller.wait()
        assert two.backend.steps_with(caller.sequence.id, since) <= 2
        two.worker.cancel(other.ticket)
        other.wait()
    stats = two.worker.stats()
    assert stats.finished == 40
    assert stats.running == 0


def test_a_cancel_that_comes_before_the_request_or_after_its_end_does_nothing(two: Setup) -> None:
    early, late = Caller(two.worker), two.ask().wait()
    two.worker.cancel(early.ticket)
    early.wait()
    early.submit([1])
    two.worker.cancel(late.ticket)
    late.ticket.ended = False  # as for somebody who saw it just before its end
    two.worker.cancel(late.ticket)
    late.ticket.ended = True
    assert len(two.ask().wait().tokens) == 5
    assert early.messages == []
    assert two.worker.stats().finished == 2


def test_samples_of_one_request_share_a_seed_and_one_ticket(two: Setup) -> None:
    caller = two.ask(params=replace(FIVE, n=3, temperature=1.0)).wait()
    accepted = caller.messages[0]
    assert isinstance(accepted, Accepted)
    assert len({seq.seed for seq in accepted.sequences}) == 1
    assert [seq.sample for seq in accepted.sequences] == [0, 1, 2]
    assert len(caller.tokens) == 15
    long = two.ask(params=replace(LONG, n=3))
    wait_for(lambda: len(long.tokens) > 3)
    two.worker.cancel(long.ticket)
    long.wait()
    stats = two.worker.stats()
    assert (stats.running, stats.waiting, stats.finished) == (0, 0, 6)


def test_every_sample_that_waits_is_counted_but_as_one_request(two: Setup) -> None:
    fill(two)
    two.ask([1] * 5, replace(FIVE, n=3))
    assert two.worker.stats().waiting == 3
    two.ask([1] * 5)
    with pytest.raises(QueueFullError, match="2 requests with 20 prompt tokens"):
        two.worker.admit(lambda _: True)


# --- failing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [BackendError("no luck"), MemoryError("no luck")])
def test_a_failing_step_gives_everybody_in_flight_the_same_error(
    two: Setup, failure: BaseException
) -> None:
    running = fill(two)
    waiting, unknown = two.ask(), Caller(two.worker)
    two.backend.failure = failure
    two.backend.go_on()
    callers = [*running, waiting, unknown]
    errors = {caller.wait().error for caller in callers}
    (error,) = errors
    assert isinstance(error, BackendError)
    assert "no luck" in str(error)
    assert two.worker.admission.failure is error
    unknown.submit([1])
    with pytest.raises(BackendError, match=r"the engine has stopped: .*no luck"):
        two.worker.admit(lambda _: True)
    stats = two.worker.stats()
    assert (stats.running, stats.waiting) == (0, 0)


@pytest.mark.parametrize("where", ["_count", "_cancel", "_add"])
def test_no_error_ends_the_thread_and_leaves_people_waiting(
    two: Setup, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = fill(two)

    def fail(*_: Any) -> None:
        raise SystemExit("a defect")

    monkeypatch.setattr(two.worker, where, fail)
    callers = [*running, two.ask()]
    two.worker.cancel(running[0].ticket)
    two.backend.go_on()
    (error,) = {caller.wait().error for caller in callers}
    assert isinstance(error, BackendError)
    assert "a defect" in str(error)
    assert "the worker failed" in caplog.text
    assert two.worker._thread.is_alive()
    with pytest.raises(BackendError, match="a defect"):
        two.ask()


def test_a_row_that_is_not_finite_ends_alone(two: Setup) -> None:
    two.backend.spoiled = {7}
    other, caller = two.ask(params=LONG), two.ask([7, 1]).wait()
    last = caller.messages[-1]
    assert isinstance(last, TokenEvent)
    assert "not finite" in str(last.error)
    assert len(other.wait().tokens) == 100


# --- ending -------------------------------------------------------------------------------------


def test_closing_tells_everybody_at_once_also_while_a_step_hangs(two: Setup) -> None:
    callers = [*fill(two), two.ask(), Caller(two.worker)]
    two.worker.close()
    assert [str(caller.error) for caller in callers] == ["the LLM is closed"] * 4
    assert len({id(caller.error) for caller in callers}) == 4
    assert not two.worker.ended.done()
    counts = [len(caller.messages) for caller in callers]
    two.backend.go_on()
    two.worker.close()
    two.worker.join(PATIENCE)
    assert [len(caller.messages) for caller in callers] == counts
    assert not two.worker._thread.is_alive()
    stats = two.worker.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    with pytest.raises(CaravanError, match="the LLM is closed"):
        two.ask()


def test_draining_ends_what_is_in_flight_and_refuses_the_rest(two: Setup) -> None:
    running, early = fill(two), Caller(two.worker)
    two.worker.drain()
    with pytest.raises(CaravanError, match="is draining"):
        two.ask()
    early.submit([1])  # it was let in before
    two.backend.go_on()
    two.worker.admission.drained.result(PATIENCE)
    assert [len(caller.tokens) for caller in (*running, early)] == [100, 100, 5]


def test_a_call_of_several_requests_goes_on_while_draining(two: Setup) -> None:
    call = two.worker.hold(lambda _: True)
    two.worker.drain()
    assert not two.worker.admission.drained.done()
    for _ in range(2):
        ticket = two.worker.admit(lambda _: True, call)
        two.worker.submit(ticket, [1], FIVE)
        wait_for(partial(getattr, ticket, "ended"))
    assert two.worker.stats().completion_tokens == 10
    assert not two.worker.admission.drained.done()
    two.worker.cancel(call)
    two.worker.admission.drained.result(PATIENCE)


def test_an_idle_worker_drains_at_once(two: Setup) -> None:
    two.ask().wait()
    two.worker.drain()
    assert two.worker.admission.drained.done()


def test_finalizers_may_cancel_at_any_line_of_any_thread(two: Setup) -> None:
    """As a cycle is collected wherever something is allocated, locks held or not."""

    class Stream:
        def __init__(self) -> None:
            self.ticket = two.worker.admit(lambda _: True)
            self.cycle = self
            two.worker.submit(self.ticket, [1], FIVE)

        def __del__(self) -> None:
            if hasattr(self, "ticket"):
                two.worker.cancel(self.ticket)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            try:
                Stream()
            except QueueFullError:
                time.sleep(0.001)
            two.worker.stats()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    wait_for(lambda: two.worker.stats().running == two.worker.stats().waiting == 0)


def test_in_a_fork_every_use_is_refused(two: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    caller, own = Caller(two.worker), os.getpid()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: own + 1)
        for use in (
            lambda: two.worker.admit(lambda _: True),
            lambda: two.worker.hold(lambda _: True),
            lambda: caller.submit([1]),
            two.worker.stats,
            two.worker.drain,
        ):
            with pytest.raises(CaravanError, match="after fork: load it in the child process"):
                use()
        two.worker.cancel(caller.ticket)
        two.worker.close()
    assert len(caller.submit([1, 2]).wait().tokens) == 5


EXIT = """
import sys, time
from llama_runtime import worker
from llama_runtime.params import SamplingParams
from tests.watched_backend import watched_engine

worker.EXIT_SECONDS = 1.0
engine, backend = watched_engine()
run = backend.run
def slow(step):
    time.sleep(0.05)
    return run(step)
backend.run = slow
close = backend.close
backend.close = lambda: (close(), print("closed"))
mine = worker.Worker(engine, max_queued_requests=3, max_queued_tokens=99)
ticket = mine.admit(lambda message: True)
mine.submit(ticket, [1], SamplingParams(max_tokens=100))
if sys.argv[1] == "hangs":
    backend.hang_after(0)
    backend.wait_until_it_hangs()
while not backend.steps:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(("kind", "said"), [("runs", "closed\n"), ("hangs", "")])
def test_the_program_ends_with_its_thread_stopped_or_soon_given_up(kind: str, said: str) -> None:
    started = time.monotonic()
    program = subprocess.run(
        [sys.executable, "-c", EXIT, kind],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (program.returncode, program.stdout, program.stderr) == (0, said, "")
    assert time.monotonic() - started < 10


FORK = """
import asyncio, os, signal, sys
from llama_runtime import worker
from llama_runtime.errors import CaravanError
from llama_runtime.params import SamplingParams
from tests.watched_backend import watched_engine

engine, backend = watched_engine()
mine = worker.Worker(engine, max_queued_requests=3, max_queued_tokens=99)
ticket = mine.admit(lambda message: True)
mine.submit(ticket, [1], SamplingParams(max_tokens=5))
mine.admission._lock.acquire()  # a thread of the parent is in the middle of its bookkeeping
child = os.fork()
if child == 0:
    signal.alarm(20)
    for use in (lambda: mine.admit(lambda message: True), mine.stats, mine.drain):
        try:
            use()
        except CaravanError as error:
            print("after fork" in str(error))
    mine.cancel(ticket)
    mine.close()
    sys.exit(7)  # by way of what runs at the end of a program
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
mine.admission._lock.release()
while not ticket.ended:
    pass
print(mine.stats().completion_tokens, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_real_fork_never_hangs_and_leaves_the_parent_alone() -> None:
    program = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (program.returncode, program.stderr) == (0, "")
    assert program.stdout == "True\nTrue\nTrue\n7\n5\n"
