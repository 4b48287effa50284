"""An LLM through its life: several threads, closing, failing, forking, and its limits."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_runtime.completion import Completion, Request
from llama_runtime.errors import (
    BackendError,
    BundleError,
    CapacityError,
    CaravanError,
    RequestError,
)
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams

PROMPTS = ["a", "Hello", "wörld 🦙", "x" * 40, "The llamas walk " * 4, "b" * 33]
TEN = SamplingParams(max_tokens=10, ignore_eos=True)
WARM = SamplingParams(max_tokens=10, temperature=1.5, seed=3, ignore_eos=True)


@pytest.fixture
def own(tiny_bundle: Path) -> Iterator[LLM]:
    """One that a test may break."""
    with LLM(tiny_bundle, max_batch=4, max_len=120, threads=1) as llm:
        yield llm


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


# --- threads ------------------------------------------------------------------------------------


def test_threads_at_once_get_the_same_results_as_alone(own: LLM) -> None:
    before = own.stats()
    alone = [own.generate(prompt, WARM)[0] for prompt in PROMPTS]

    def work(i: int) -> bool:
        if i % 3 == 0:
            return own.generate(PROMPTS, WARM) == alone
        if i % 3 == 1:
            return [own.generate(prompt, WARM)[0] for prompt in PROMPTS] == alone
        streamed = [[event.token_id for event in own.stream(prompt, WARM)] for prompt in PROMPTS]
        return streamed == tokens(alone)

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(work, range(12))) == [True] * 12
    after = own.stats()
    assert after.finished - before.finished == 13 * len(PROMPTS)
    assert after.completion_tokens - before.completion_tokens == 13 * len(PROMPTS) * 10


def test_threads_that_leave_and_fail_do_not_disturb_the_others(own: LLM) -> None:
    alone = own.generate(PROMPTS, WARM)

    def work(i: int) -> bool:
        if i % 3 == 0:
            return own.generate(PROMPTS, WARM) == alone
        if i % 3 == 1:
            return next(iter(own.stream(PROMPTS[i % len(PROMPTS)], WARM))).error is None
        try:
            own.generate(["a", "b", ""], WARM)
        except RequestError:
            return True
        return False

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(work, range(30))) == [True] * 30
    assert own.stats().running == own.stats().waiting == 0


# --- the life of an LLM -------------------------------------------------------------------------


def test_stats_count_what_went_through(own: LLM) -> None:
    own.generate(["Hello", "abc"], TEN)
    stats = own.stats()
    assert (stats.prompt_tokens, stats.completion_tokens, stats.finished) == (8, 20, 2)
    own.generate("a", TEN)
    assert stats.finished == 2  # a copy
    assert own.stats().finished == 3


def test_warm_up_leaves_the_model_ready(own: LLM) -> None:
    own.warm_up()
    assert own.health() == "ok"
    assert own.stats().running == 0


def test_after_close_every_use_is_refused(own: LLM) -> None:
    half_read = own.stream("Hello", TEN)
    next(half_read)
    own.close()
    own.close()
    assert own.health() == "closed"
    for use in (
        lambda: own.generate("a"),
        lambda: own.chat([{"role": "user", "content": "a"}]),
        lambda: own.stream("a"),
        lambda: list(own.run([Request("a", TEN)])),
        own.warm_up,
        lambda: next(half_read),  # not a shorter text, taken for a whole one
    ):
        with pytest.raises(CaravanError, match="the LLM is closed"):
            use()
    assert own.stats().running == 0


def test_leaving_the_context_closes_also_on_errors(tiny_bundle: Path) -> None:
    opened: list[LLM] = []

    def fail() -> None:
        with LLM(tiny_bundle, max_batch=1, max_len=20, threads=1) as llm:
            opened.append(llm)
            assert llm.health() == "ok"
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert opened[0].health() == "closed"


def test_closing_ends_the_calls_of_other_threads(own: LLM) -> None:
    started = threading.Event()

    def endless() -> Iterator[Request]:
        while True:
            started.set()
            yield Request("Hello", TEN)

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(lambda: list(own.run(endless())))
        assert started.wait(30)
        own.close()
        with pytest.raises(CaravanError, match="closed"):
            running.result(timeout=30)


def test_a_failing_graph_fails_all_calls_in_flight_and_those_after(
    own: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = own.stream("Hello", TEN)
    next(stream)

    def fail(step: Any) -> Any:
        raise BackendError("the graph failed: no luck")

    monkeypatch.setattr(own._engine._engine._runner._backend, "run", fail)  # type: ignore[attr-defined]
    requests = [Request("a", TEN), Request("b", TEN), Request("", TEN)]
    completions = dict(own.run(requests))
    assert [completions[i].finish_reason for i in range(3)] == ["error"] * 3
    assert isinstance(completions[0].error, BackendError)
    assert isinstance(completions[2].error, RequestError)
    assert own.health() == "failed"
    for use in (lambda: next(stream), lambda: own.generate("a", TEN), lambda: own.stream("a", TEN)):
        with pytest.raises(BackendError, match="no luck"):
            use()


def test_logits_that_are_not_finite_end_their_own_row_only(
    own: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = own._engine._engine._runner._backend  # type: ignore[attr-defined]
    run = backend.run

    def poison(step: Any) -> Any:
        logits = run(step)
        sampled = [chunk.seq for chunk in step.chunks if chunk.samples]
        for row, seq in zip(logits, sampled, strict=False):
            if seq.token_ids[0] == 7 and seq.num_completion_tokens == 3:
                row[5] = np.nan
        return logits

    expected = own.generate("Hello", TEN)
    monkeypatch.setattr(backend, "run", poison)
    completions = dict(
        own.run([Request("Hello", TEN), Request([7, 8], TEN), Request("Hello", TEN)])
    )
    assert tokens([completions[0], completions[2]]) == tokens(expected) * 2
    assert completions[1].finish_reason == "error"
    assert len(completions[1].token_ids) == 3
    assert "not finite" in str(completions[1].error)
    assert own.health() == "ok"
    with pytest.raises(BackendError, match="not finite"):
        own.generate([7, 8], TEN)


FORK = """
import os, signal, sys
from llama_runtime import LLM, CaravanError, SamplingParams

params = SamplingParams(max_tokens=5, ignore_eos=True)
llm = LLM(sys.argv[1], max_batch=2, max_len=40, threads=2)
expected = llm.generate("Hello", params)[0].token_ids
stream = llm.stream("Hello", params)
next(stream)
llm._engine._lock.acquire()  # a thread of the parent is in the middle of a step
child = os.fork()
if child == 0:
    signal.alarm(20)
    refused = 0
    generate, start = lambda: llm.generate("a"), lambda: llm.stream("a")
    for use in (generate, start, lambda: next(stream), llm.stats):
        try:
            use()
        except CaravanError as error:
            refused += "after fork: load it in the child process" in str(error)
    del stream
    llm.close()
    os._exit(refused)
llm._engine._lock.release()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print([event.token_id for event in stream] == expected[1:])
llm.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_use_after_fork_is_refused_and_never_hangs(tiny_bundle: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, str(tiny_bundle)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.stderr == ""
    assert process.stdout == "4\nTrue\n"


# --- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        *(("max_batch", value, 1024) for value in (0, -1, 1025, True, 1.0, "4")),
        *(("max_len", value, 256) for value in (0, 1, -1, 257, True, 20.0, "20")),
        *(("threads", value, 1024) for value in (0, -1, 1025, True, 1.0, "1")),
    ],
)
def test_a_limit_out_of_range_is_refused_by_name(
    tiny_bundle: Path, name: str, value: Any, limit: int
) -> None:
    with pytest.raises(RequestError) as refusal:
        LLM(tiny_bundle, **{"max_batch": 1, "threads": 1, name: value})
    assert refusal.value.param == name
    low = 2 if name == "max_len" else 1
    assert str(refusal.value) == f"{name} must lie in {low} to {limit}, not {value!r}"


def test_by_default_max_len_is_the_models_limit(tiny_bundle: Path) -> None:
    with LLM(tiny_bundle, max_batch=1, threads=1) as llm:
        assert llm.max_len == llm.bundle.manifest.geometry.max_positions == 256
        longest = SamplingParams(max_tokens=255, ignore_eos=True)
        (completion,) = llm.generate([[5]], longest)
        assert len(completion.token_ids) == 255


def test_a_bundle_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="nowhere"):
        LLM(tmp_path / "nowhere")


def test_a_stream_that_is_never_read_gives_its_slot_back(own: LLM) -> None:
    streams = [own.stream("Hello", TEN) for _ in range(3)]
    assert own.stats().waiting == 3
    del streams
    gc.collect()
    stats = own.stats()
    assert (stats.running, stats.waiting, stats.finished) == (0, 0, 3)


def test_a_stream_says_its_seed_and_a_with_block_ends_it(own: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, ignore_eos=True)
    with own.stream("Hello", params) as stream:
        assert stream.num_prompt_tokens == 5
        first = next(stream)
    assert own.stats().running == 0
    assert list(stream) == []
    (again,) = own.generate("Hello", replace(params, seed=stream.seed))
    assert again.token_ids[0] == first.token_id


def test_an_error_among_many_prompts_says_which(own: LLM) -> None:
    with pytest.raises(CapacityError) as refusal:
        own.generate(["a", "b" * 500, "c"], TEN)
    assert refusal.value.__notes__ == ["prompt 1 of 3"]


def test_one_text_is_no_batch(own: LLM) -> None:
    with pytest.raises(RequestError, match="a list of texts"):
        own.generate_batch("abc")
