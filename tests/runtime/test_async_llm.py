"""The facade for asyncio: the loop never waits for a step, and no slot outlives who wanted it."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from llama_runtime import loading
from llama_runtime.admission import Ticket
from llama_runtime.async_llm import AsyncLLM
from llama_runtime.async_stream import AsyncStream
from llama_runtime.contract import Geometry
from llama_runtime.errors import (
    BackendError,
    BundleError,
    CapacityError,
    CaravanError,
    QueueFullError,
    RequestError,
)
from llama_runtime.events import TokenEvent
from llama_runtime.llm import LLM
from llama_runtime.mailbox import Mailbox
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from tests.watched_backend import PATIENCE, Watched, wait_for

T = TypeVar("T")
PROMPTS = ["a", "Hello", "wörld 🦙", "x" * 40, "The llamas walk " * 4, "b" * 33]
TEN = SamplingParams(max_tokens=10, seed=5, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, ignore_eos=True)
WAYS = ["cancel", "aclose", "async with", "aclosing", "break", "garbage", "timeout"]
CHAT = [{"role": "user", "content": "Hello"}]


@dataclass
class Setup:
    llm: AsyncLLM
    backend: Watched

    @property
    def running(self) -> int:
        return self.llm.stats().running


@pytest.fixture
def backends(fake_backend: None, monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """Models in this process run on `Watched` backends, which come to stand here."""
    made: list[Watched] = []

    def make(
        session: object,
        geometry: Geometry,
        *,
        num_slots: int,
        capacity: int,
        num_prefix_blocks: int,
        **_: object,
    ) -> Watched:
        made.append(Watched(num_slots, capacity, geometry.vocab_size, num_prefix_blocks))
        return made[-1]

    monkeypatch.setattr(loading, "OrtCpu", make)
    return made


@pytest.fixture
def two(backends: list[Watched], fake_bundle: Path) -> Iterator[Setup]:
    """Two slots, and room for four that wait."""
    llm = AsyncLLM(fake_bundle, max_batch=2, max_len=256, threads=1, max_queued_requests=4)
    yield Setup(llm, backends[0])
    backends[0].go_on()
    asyncio.run(llm.close())
    assert backends[0].num_closes == 1
    assert not workers()


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "caravan-worker"]


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(main(), PATIENCE)

    return asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


async def tokens(stream: AsyncStream) -> list[int | None]:
    return [event.token_id async for event in stream]


async def hung(two: Setup, timeout: float | None = None) -> list[AsyncStream]:
    """Streams in both slots, in the middle of a step that hangs."""
    two.backend.hang_after(0)
    streams = [two.llm.stream(text, LONG, timeout=timeout) for text in "ab"]
    starts = [asyncio.create_task(stream.start()) for stream in streams]
    submitted = two.llm._worker.admission
    await until(lambda: submitted._tokens == 2 and len(two.backend.steps) == 1)
    two.backend.hang_after(2)
    await asyncio.gather(*starts)
    await asyncio.to_thread(two.backend.wait_until_it_hangs)
    assert two.running == 2
    return streams


# --- what comes out -----------------------------------------------------------------------------


def test_completions_are_those_of_the_blocking_facade(two: Setup, fake_llm: LLM) -> None:
    warm = [replace(TEN, temperature=1.5, seed=i, max_tokens=3 + i) for i in range(len(PROMPTS))]
    expected = fake_llm.generate(PROMPTS, warm)
    assert run(lambda: two.llm.generate(PROMPTS, warm)) == expected
    assert run(lambda: two.llm.generate(PROMPTS[1], warm[1])) == expected[1:2]
    ids = fake_llm.tokenizer.encode(PROMPTS[1])
    assert run(lambda: two.llm.generate([ids], warm[1:2])) == expected[1:2]
    assert run(lambda: two.llm.generate([])) == []
    assert (two.llm.max_batch, two.llm.max_len, two.llm.threads) == (2, 256, 1)


def test_chats_are_those_of_the_blocking_facade(two: Setup, fake_llm: LLM) -> None:
    several = [CHAT, [*CHAT, {"role": "assistant", "content": "Hi"}]]
    assert run(lambda: two.llm.chat(CHAT, TEN)) == fake_llm.chat(CHAT, TEN)
    assert run(lambda: two.llm.chat(several, TEN)) == fake_llm.chat(several, TEN)
    streamed = run(lambda: tokens(two.llm.stream_chat(CHAT, TEN)))
    assert streamed == fake_llm.chat(CHAT, TEN)[0].token_ids


def test_a_stream_has_the_events_the_seed_and_the_text_of_its_completion(
    two: Setup, fake_llm: LLM
) -> None:
    params = replace(TEN, temperature=1.0, seed=None)

    async def main() -> None:
        stream = two.llm.stream("Hello", params)
        assert (stream.seed, stream.num_prompt_tokens) == (None, None)
        await stream.start()
        await stream.start()
        assert stream.num_prompt_tokens == 5
        events = [event async for event in stream]
        (same,) = fake_llm.generate("Hello", replace(params, seed=stream.seed))
        assert [event.token_id for event in events] == same.token_ids
        assert "".join(event.text for event in events) == same.text
        assert events[-1].finish_reason == same.finish_reason
        assert await tokens(stream) == []

    run(main)


def test_defaults_are_the_bundles(backends: list[Watched], raw_bundle: Path) -> None:
    async def main() -> None:
        async with await AsyncLLM.load(raw_bundle, max_batch=1, threads=1) as llm:
            assert llm.request("a").params == llm.default_params
            assert llm.default_params.temperature == 0.5
            assert not llm.has_chat_template
            with pytest.raises(RequestError, match="no chat template"):
                await llm.chat(CHAT)

    run(main)


def test_loops_of_several_threads_get_the_same_results_as_alone(two: Setup, fake_llm: LLM) -> None:
    expected = fake_llm.generate(PROMPTS, TEN)

    async def patient(prompt: str) -> list[int | None]:
        while True:
            try:
                return await tokens(two.llm.stream(prompt, TEN))
            except QueueFullError:
                await asyncio.sleep(0.001)

    async def main() -> bool:
        streamed = await asyncio.gather(*(patient(prompt) for prompt in PROMPTS))
        return list(streamed) == [one.token_ids for one in expected]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: run(main), range(8))) == [True] * 8
    assert two.llm.stats().finished == 8 * len(PROMPTS)


def test_samples_come_flat_in_the_order_of_prompts_and_samples(two: Setup, fake_llm: LLM) -> None:
    params = replace(TEN, n=3, temperature=5.0, max_tokens=60, ignore_eos=False)
    expected = fake_llm.generate(PROMPTS, params)
    assert run(lambda: two.llm.generate(PROMPTS, params)) == expected
    assert len({len(one.token_ids) for one in expected}) > 2

    async def main() -> None:
        found: dict[int, list[int | None]] = {0: [], 1: [], 2: []}
        async for event in two.llm.stream(PROMPTS[1], params):
            found[event.sample].append(event.token_id)
        assert [*found.values()] == [one.token_ids for one in expected[3:6]]

    run(main)


def test_log_probabilities_come_along(two: Setup, fake_llm: LLM) -> None:
    params = replace(TEN, logprobs=True, prompt_logprobs=True, top_logprobs=2)
    expected = fake_llm.generate("Hello", params)
    assert run(lambda: two.llm.generate("Hello", params)) == expected

    async def main() -> None:
        stream = two.llm.stream("Hello", params)
        assert stream.prompt_logprobs == []
        events = [event async for event in stream]
        assert stream.prompt_logprobs == expected[0].prompt_logprobs
        assert [event.logprob for event in events] == expected[0].logprobs

    run(main)


# --- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ("", TEN, RequestError, "prompt"),
        ([], TEN, RequestError, "prompt"),
        ([300], TEN, RequestError, "prompt"),
        (["a"], TEN, RequestError, "prompt"),
        (b"a", TEN, RequestError, "prompt"),
        (7, TEN, RequestError, "prompt"),
        ("\ud800", TEN, RequestError, "prompt"),
        ("a" * 300, TEN, CapacityError, "prompt"),
        ("a", {"max_tokens": 1}, RequestError, "params"),
    ],
)
def test_a_wrong_request_is_told_to_who_made_it(
    two: Setup, prompt: Any, params: Any, error: type[RequestError], param: str
) -> None:
    async def stream() -> None:
        async for _ in two.llm.stream(prompt, params):
            pytest.fail("it is wrong")

    async def generate() -> None:
        await two.llm.generate([[1, 2], prompt], params)

    for use in (stream, generate):
        with pytest.raises(error) as refusal:
            run(use)
        assert refusal.value.param == param
    if param == "prompt":
        assert refusal.value.__notes__ == ["prompt 1 of 2"]
    assert len(run(lambda: two.llm.generate("a", TEN))[0].token_ids) == 10
    wait_for(lambda: two.running == two.llm.stats().waiting == 0)


@pytest.mark.parametrize("timeout", [float("nan"), -1, 0, 0.0, True, "1", [], -float("inf")])
def test_a_wrong_timeout_is_refused_by_name(two: Setup, timeout: Any) -> None:
    with pytest.raises(RequestError, match="timeout must be None or a number of seconds above 0"):
        two.llm.stream("a", timeout=timeout)
    for use in (
        lambda: two.llm.generate("a", timeout=timeout),
        lambda: two.llm.chat(CHAT, timeout=timeout),
        lambda: two.llm.drain(timeout),
        lambda: two.llm.close(timeout),
    ):
        with pytest.raises(RequestError) as refusal:
            run(use)
        assert refusal.value.param == "timeout"
    assert two.llm.health() == "ok"


@pytest.mark.parametrize("timeout", [float("inf"), pytest.param(10**400, id="huge")])
def test_a_timeout_beyond_every_clock_is_none(two: Setup, timeout: float) -> None:
    assert len(run(lambda: tokens(two.llm.stream("a", TEN, timeout=timeout)))) == 10
    assert len(run(lambda: two.llm.generate("a", TEN, timeout=timeout))) == 1


@pytest.mark.parametrize("name", ["max_queued_requests", "max_queued_tokens"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "4", None, 10**10])
def test_a_bound_out_of_range_is_refused_before_anything_is_loaded(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        AsyncLLM("nowhere", **{name: value})
    assert refusal.value.param == name


def test_what_cannot_be_loaded_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        run(lambda: AsyncLLM.load(tmp_path / "nowhere"))
    assert not workers()


@pytest.mark.parametrize(
    ("prompts", "params", "said"),
    [
        ("a", [TEN, TEN], "1 prompts with 2 parameters"),
        (["a", "b"], ["c", TEN], "params must be SamplingParams, or a list of them, not str"),
        ("a", 3, "params must be SamplingParams, or a list of them, not int"),
    ],
)
def test_parameters_that_do_not_match_are_refused(
    two: Setup, prompts: Any, params: Any, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        run(lambda: two.llm.generate(prompts, params))


# --- the loop goes on ---------------------------------------------------------------------------


@pytest.mark.alone
def test_nothing_but_tokens_waits_for_a_step_that_hangs(two: Setup) -> None:
    async def main() -> None:
        await hung(two)
        started = time.monotonic()
        assert two.llm.stats().running == 2
        assert two.llm.health() == "ok"
        waiting = asyncio.create_task(two.llm.generate("c", TEN))
        with pytest.raises(TimeoutError, match=r"longer than its timeout of 0\.05 s"):
            await tokens(two.llm.stream("d", TEN, timeout=0.05))
        with pytest.raises(TimeoutError, match=r"longer than its timeout of 0\.05 s"):
            await two.llm.chat(CHAT, TEN, timeout=0.05)
        assert two.llm.stats().waiting >= 1
        assert await two.llm.drain(0.05) is False
        assert two.llm.health() == "draining"
        await two.llm.close(timeout=0.05)
        assert two.llm.health() == "closed"
        with pytest.raises(CaravanError, match="the LLM is closed"):
            await waiting
        assert time.monotonic() - started < 2

    run(main)
    assert two.backend.num_closes == 0


def test_tokenizing_and_templates_run_beside_the_loop(
    two: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def slow(*_: object, **__: object) -> list[int]:
        threads.append(threading.get_ident())
        time.sleep(0.2)
        return [1, 2]

    monkeypatch.setattr(two.llm._encoder, "encode", slow)
    monkeypatch.setattr(two.llm._encoder, "encode_chat", slow)

    async def main() -> None:
        work = asyncio.gather(two.llm.generate("a", TEN), two.llm.chat(CHAT, TEN))
        longest, last = 0.0, time.monotonic()
        while not work.done():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        await work
        assert longest < 0.15
        with pytest.raises(TimeoutError):
            await tokens(two.llm.stream("a", TEN, timeout=0.05))
        assert two.llm.stats().waiting <= 1

    run(main)
    assert threading.get_ident() not in threads
    assert len(threads) == 3
    wait_for(lambda: two.llm.stats().waiting == 0)


def test_grammars_are_compiled_beside_the_loop_and_the_worker(
    two: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def compiled(*_: object) -> NoReturn:
        threads.append(threading.current_thread())
        raise RequestError("no", param="regex")

    monkeypatch.setattr("llama_runtime.grammars._compile", compiled)
    held = SamplingParams(max_tokens=5, regex="a")

    async def main() -> None:
        for prompt in ("a", [1, 2]):
            with pytest.raises(RequestError):
                await two.llm.generate(prompt, held)
            with pytest.raises(RequestError):
                await tokens(two.llm.stream(prompt, held))
        with pytest.raises(RequestError):
            await two.llm.chat(CHAT, held)

    run(main)
    assert len(threads) == 5
    assert threading.current_thread() not in threads
    assert not any(thread.name == "caravan-worker" for thread in threads)


# --- giving up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_whoever_gives_up_frees_the_slot_within_two_steps(
    two: Setup, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        for _ in range(5):
            other = two.llm.stream("b", LONG)
            await anext(other)
            given_up, kept = await leave(two, way)
            await until(partial(ended, given_up))
            assert given_up.finish_reason == "abort"
            assert two.backend.steps_with(given_up.id, since[given_up.id]) <= 2
            del kept
            await other.aclose()
            await until(lambda: two.running == 0)

    since: dict[int, int] = {}  # steps when a sequence was given up
    cancel = two.llm._worker.cancel

    def watched(ticket: Ticket) -> None:
        for seq in ticket.sequences:
            since.setdefault(seq.id, len(two.backend.steps))
        cancel(ticket)

    monkeypatch.setattr(two.llm._worker, "cancel", watched)
    two.backend.seconds = 0.002
    run(main)


async def leave(two: Setup, way: str) -> tuple[Sequence, AsyncStream | None]:
    """Begin a stream and give it up; its sequence, and the stream if a name still refers to it."""
    stream = two.llm.stream("a", LONG, timeout=0.05 if way == "timeout" else None)
    await stream.start()
    (seq,) = stream.sequences
    if way == "break":
        async for _ in stream:
            return seq, None
    if way == "aclosing":
        async with aclosing(stream):
            async for _ in stream:
                return seq, stream
    if way == "async with":
        async with stream as same:
            await anext(same)
    elif way == "aclose":
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        assert await tokens(stream) == []
    elif way == "cancel":
        task = asyncio.create_task(tokens(stream))
        await asyncio.sleep(0.01)
        task.cancel()
    elif way == "timeout":
        await until(partial(ended, seq))  # nobody waits for an event
        with pytest.raises(TimeoutError):
            await tokens(stream)
    else:
        return seq, None
    return seq, stream


def ended(seq: Sequence) -> bool:
    return seq.finish_reason is not None


def test_who_waits_for_an_event_hears_that_another_task_closed_the_stream(two: Setup) -> None:
    async def main() -> None:
        (first, second) = await hung(two)
        task = asyncio.create_task(tokens(first))
        await asyncio.sleep(0.01)
        await first.aclose()
        assert len(await task) < 150
        two.backend.go_on()
        assert len(await tokens(second)) == 150

    run(main)


def test_nothing_follows_the_end_of_a_request(two: Setup) -> None:
    async def main() -> None:
        mailbox, request = Mailbox(), two.llm.request("a", TEN)
        await request.begin(mailbox)
        events: list[TokenEvent] = []
        while not request.ended:
            await mailbox.wait()
            while (letter := mailbox.take()) is not None:
                event = request.take(letter[1])
                events += [] if event is None else [event]
        assert len(events) == 10
        assert request.take(TimeoutError("its time was up just then")) is None
        assert request.take(events[0]) is None

    run(main)


def test_a_stream_that_ended_leaves_nothing_on_its_loop(two: Setup) -> None:
    async def main() -> None:
        stream = two.llm.stream("a", TEN, timeout=600)
        assert len(await tokens(stream)) == 10
        mailbox = weakref.ref(stream._mailbox)
        del stream
        await asyncio.sleep(0.01)
        gc.collect()
        assert mailbox() is None

    run(main)


def test_a_request_that_waits_can_be_given_up_too(two: Setup) -> None:
    async def main() -> None:
        streams = await hung(two)
        waiting = [asyncio.create_task(tokens(two.llm.stream("c", TEN))) for _ in range(4)]
        await until(lambda: two.llm.stats().waiting == 4)
        with pytest.raises(QueueFullError, match=r"4 requests with . prompt tokens wait"):
            await two.llm.generate("d", TEN)
        waiting[0].cancel()
        waiting[1].cancel()
        await asyncio.sleep(0)
        two.backend.go_on()
        assert [len(await task) for task in waiting[2:]] == [10, 10]
        assert [len(await tokens(stream)) for stream in streams] == [150, 150]
        stats = two.llm.stats()
        assert (stats.running, stats.waiting) == (0, 0)

    run(main)


def test_a_call_that_is_cancelled_or_fails_gives_up_all_of_its_requests(two: Setup) -> None:
    async def main() -> None:
        call = asyncio.create_task(two.llm.generate(["a"] * 9, LONG))
        await until(lambda: two.running == 2)
        call.cancel()
        await until(lambda: two.running == two.llm.stats().waiting == 0)
        with pytest.raises(RequestError):
            await two.llm.generate(["a", "b", ""], LONG)
        await until(lambda: two.running == two.llm.stats().waiting == 0)
        with pytest.raises(TimeoutError):
            await two.llm.generate(["a"] * 50, LONG, timeout=0.02)
        await until(lambda: two.running == two.llm.stats().waiting == 0)
        assert two.llm.stats().completion_tokens < 150  # so none came to its end

    two.backend.seconds = 0.002
    run(main)


def test_a_batch_larger_than_the_queue_waits_for_itself(two: Setup) -> None:
    async def main() -> None:
        calls = (two.llm.generate(PROMPTS * 5, TEN) for _ in range(4))
        found = await asyncio.gather(*calls)
        assert [len(one) for one in found] == [30] * 4
        assert found[0] == found[1] == found[2] == found[3]

    run(main)


def test_a_large_batch_leaves_room_in_the_queue_for_others(two: Setup) -> None:
    async def main() -> None:
        await hung(two)
        call = asyncio.create_task(two.llm.generate(["c"] * 40, TEN))
        await until(lambda: two.llm.stats().waiting == 4)
        await asyncio.sleep(0.02)
        assert two.llm.stats().waiting == 4
        two.backend.go_on()
        assert len(await call) == 40

    two.llm._worker.admission._max_requests = 100
    run(main)


def test_a_stream_that_nobody_reads_never_begins(two: Setup) -> None:
    async def main() -> None:
        stream = two.llm.stream("a", TEN, timeout=0.01)
        await asyncio.sleep(0.02)
        assert two.backend.steps == []
        with pytest.raises(TimeoutError):
            await anext(stream)
        two.llm.stream("a", TEN)

    run(main)
    assert two.backend.steps == []


def test_a_loop_that_was_closed_gives_its_slots_back_and_harms_nobody(
    two: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.new_event_loop()
    stream = two.llm.stream("a", LONG)
    two.backend.seconds = 0.001
    loop.run_until_complete(stream.start())
    loop.close()
    wait_for(lambda: two.llm.stats().finished == 1)
    assert two.llm.stats().completion_tokens < 100
    assert not caplog.records
    assert len(run(lambda: two.llm.generate("a", TEN))[0].token_ids) == 10
    assert two.llm.health() == "ok"


# --- failing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [BackendError("no luck"), ValueError("no luck")])
def test_a_failing_step_fails_all_in_flight_and_those_after(two: Setup, failure: Exception) -> None:
    async def main() -> None:
        streams = await hung(two, timeout=5.0)
        calls: list[asyncio.Task[Any]] = [
            *(asyncio.create_task(tokens(stream)) for stream in streams),
            asyncio.create_task(two.llm.generate(["c", "d"], TEN)),
        ]
        await until(lambda: two.llm.stats().waiting == 2)
        two.backend.failure = failure
        two.backend.go_on()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert len({id(error) for error in errors}) == 1
        assert isinstance(errors[0], BackendError)
        assert "no luck" in str(errors[0])
        assert not hasattr(errors[0], "__notes__")
        assert len(traceback.extract_tb(errors[0].__traceback__)) < 6  # of the last alone
        assert two.llm.health() == "failed"
        for use in (two.llm.generate("a"), tokens(two.llm.stream("a"))):
            with pytest.raises(BackendError, match="no luck"):
                await use
        assert await two.llm.drain(5)

    run(main)


def test_a_row_that_is_not_finite_ends_alone(two: Setup) -> None:
    two.backend.spoiled = {7}

    async def main() -> None:
        other = asyncio.create_task(two.llm.generate("a", LONG))
        with pytest.raises(BackendError, match="not finite"):
            await tokens(two.llm.stream([7, 8], TEN))
        with pytest.raises(BackendError, match="not finite") as failure:
            await two.llm.generate([[1], [7, 8]], TEN)
        assert failure.value.__notes__ == ["prompt 1 of 2"]
        assert len((await other)[0].token_ids) == 150
        assert two.llm.health() == "ok"

    run(main)


# --- the end ------------------------------------------------------------------------------------


def test_draining_lets_what_is_in_flight_end_and_refuses_the_rest(two: Setup) -> None:
    async def main() -> None:
        streams = await hung(two)
        call = asyncio.create_task(two.llm.generate(PROMPTS * 2, TEN))
        await until(lambda: two.llm.stats().waiting == 4)
        assert not await two.llm.drain(0.02)
        for use in (two.llm.generate("a"), tokens(two.llm.stream("a"))):
            with pytest.raises(CaravanError, match="is draining"):
                await use
        two.backend.go_on()
        assert await two.llm.drain(PATIENCE)
        assert [len(await tokens(stream)) for stream in streams] == [150, 150]
        assert len(await call) == 2 * len(PROMPTS)
        assert two.llm.health() == "draining"

    run(main)


def test_closing_ends_everything_and_a_second_time_nothing(two: Setup) -> None:
    async def main() -> None:
        stream = two.llm.stream("a", LONG)
        await anext(stream)
        tasks: list[asyncio.Task[Any]] = [
            asyncio.create_task(tokens(two.llm.stream("b", LONG))),
            asyncio.create_task(two.llm.generate(["c", "d"], LONG)),
        ]
        await until(lambda: two.running == 2)
        await two.llm.close()
        assert not workers()
        for use in (tokens(stream), *tasks, two.llm.generate("a"), two.llm.chat(CHAT)):
            with pytest.raises(CaravanError, match="the LLM is closed"):
                await use
        await two.llm.close()
        assert two.llm.health() == "closed"
        assert two.running == 0

    two.backend.seconds = 0.001
    run(main)


def test_a_step_that_hangs_is_given_up_with_a_warning(
    two: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        await hung(two)
        await two.llm.close(timeout=0.05)

    run(main)
    assert "a step has not ended within 0.05 s" in caplog.text
    assert workers()
    two.backend.go_on()
    wait_for(lambda: two.backend.num_closes == 1)


def test_leaving_the_context_closes_also_on_errors(
    backends: list[Watched], fake_bundle: Path
) -> None:
    async def main() -> None:
        async with AsyncLLM(fake_bundle, max_batch=1, threads=1) as llm:
            await anext(llm.stream("a"))
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(main)
    assert backends[0].num_closes == 1


def test_one_that_is_dropped_ends_its_thread_but_not_under_a_stream(
    backends: list[Watched], fake_bundle: Path
) -> None:
    async def main() -> None:
        stream = AsyncLLM(fake_bundle, max_batch=1, max_len=256, threads=1).stream("a", LONG)
        gc.collect()
        assert len(await tokens(stream)) == 150

    run(main)
    gc.collect()
    wait_for(lambda: not workers())
    assert backends[0].num_closes == 1


def test_use_after_fork_is_refused(two: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        stream = two.llm.stream("a", TEN)
        await anext(stream)
        own = os.getpid()
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: own + 1)
            for use in (
                two.llm.generate("a", TEN),
                two.llm.chat(CHAT),
                two.llm.stream("a").start(),
                two.llm.drain(),
            ):
                with pytest.raises(CaravanError, match="after fork: load it in the child process"):
                    await use
            for ask in (two.llm.stats, two.llm.health):
                with pytest.raises(CaravanError, match="after fork"):
                    ask()
            await two.llm.close()
        assert len(await tokens(stream)) == 9

    run(main)
