"""What tells strategies apart is who runs in a step; tokens and counts are the same."""

from __future__ import annotations

from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest

from llama_runtime.bench import STRATEGIES
from llama_runtime.bench.figures import figures
from llama_runtime.bench.strategies import Run, run_strategy, sizes
from llama_runtime.bench.workload import Ask
from llama_runtime.engine_group import EngineGroup
from llama_runtime.errors import BackendError
from llama_runtime.params import SamplingParams
from tests.overlapping_runner import TABLE
from tests.paged_engine import paged_engine
from tests.watched_backend import MAX_LEN, VOCAB_SIZE, Watched, watched_engine

SLOTS = 4


def asks(count: int = 11) -> list[Ask]:
    numbers = np.random.default_rng(3)
    return [
        Ask(
            tuple(numbers.integers(0, VOCAB_SIZE, numbers.integers(1, 90)).tolist()),
            int(numbers.integers(1, 20)),
        )
        for _ in range(count)
    ]


def ran(strategy: str, wanted: list[Ask], slots: int = SLOTS) -> tuple[Run, Watched]:
    engine, backend = watched_engine(slots)
    run = run_strategy(strategy, engine, wanted, slots)
    engine.check()
    return run, backend


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_as_many_tokens_come_as_were_asked_for_and_times_add_up(strategy: str) -> None:
    wanted = asks()
    run, backend = ran(strategy, wanted, 1 if strategy == "sequential" else SLOTS)
    assert [trace.output_len for trace in run.traces] == [ask.output_len for ask in wanted]
    assert [trace.input_len for trace in run.traces] == [len(ask.prompt) for ask in wanted]
    assert [len(ids) for ids in run.token_ids] == [ask.output_len for ask in wanted]
    assert run.num_steps == len(backend.steps) == len(run.occupancy)
    for trace in run.traces:
        assert trace.ttft + sum(trace.itls) == pytest.approx(trace.e2el)
        assert 0 < trace.e2el <= run.duration
    found = figures(run.traces, run.duration)
    assert found["total_output_tokens"] == sum(ask.output_len for ask in wanted)
    assert found["max_concurrent_requests"] == len(wanted)  # all are there from the start


def test_all_give_the_same_tokens() -> None:
    wanted = asks()
    alone, *others = (ran(name, wanted)[0].token_ids for name in STRATEGIES)
    assert others == [alone] * 3


def test_sequential_runs_one_request_to_its_end_before_the_next() -> None:
    run, backend = ran("sequential", asks())
    assert {held for _, held in run.occupancy} == {1}
    assert all(len(step) == 1 for step in backend.steps)
    order = [next(iter(step)) for step in backend.steps]
    assert order == sorted(order)


def test_concurrent_runs_the_graph_for_each_sequence_and_token_in_turn() -> None:
    wanted = [Ask((1, 2, 3), 10)] * SLOTS
    run, backend = ran("concurrent", wanted)
    order = [next(iter(step)) for step in backend.steps]
    assert all(len(step) == 1 for step in backend.steps)
    assert order == [0, 1, 2, 3] * 10
    assert run.num_steps == sum(ask.output_len for ask in wanted)
    assert {held for _, held in run.occupancy[: -2 * SLOTS]} == {SLOTS}


def test_a_static_batch_begins_when_the_last_of_the_one_before_has_ended() -> None:
    _, backend = ran("static", asks())
    batches = [{seq // SLOTS for seq in step} for step in backend.steps]
    assert all(len(batch) == 1 for batch in batches)
    order = [next(iter(batch)) for batch in batches]
    assert order == sorted(order)
    assert max(len(step) for step in backend.steps) > 1


def test_continuous_fills_a_slot_as_soon_as_it_is_free() -> None:
    wanted = [Ask((1,), 2), *[Ask((1,), 12)] * 3, Ask((2,), 2)]
    run, backend = ran("continuous", wanted)
    assert any(4 in step and 1 in step for step in backend.steps)
    assert run.num_steps < ran("static", wanted)[0].num_steps


def test_an_engine_that_ran_apart_runs_batches_again() -> None:
    engine, backend = watched_engine(SLOTS)
    run_strategy("concurrent", engine, asks(), SLOTS)
    before = len(backend.steps)
    run_strategy("continuous", engine, asks(), SLOTS)
    assert max(map(len, backend.steps[before:])) > 1


def test_a_sequence_that_is_aborted_is_not_run_when_its_turn_comes() -> None:
    engine, backend = watched_engine(SLOTS)
    engine.run_apart()
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    seqs = [engine.add([1], params) for _ in range(SLOTS)]
    engine.step()
    engine.abort(seqs[2].id)
    while engine.has_work:
        engine.step()
    assert [step for step in backend.steps if seqs[2].id in step] == []
    assert [seq.num_completion_tokens for seq in seqs] == [5, 5, 0, 5]
    assert engine.num_failed_steps == 0
    engine.check()


def test_several_engines_run_apart_too() -> None:
    engines = [watched_engine(2) for _ in range(2)]
    ids = count()
    for engine, _ in engines:
        engine._ids = ids
    group = EngineGroup([engine for engine, _ in engines])
    wanted = asks(6)
    run = run_strategy("concurrent", group, wanted, 4)
    assert run.token_ids == ran("sequential", wanted, 1)[0].token_ids
    assert all(len(step) == 1 for _, backend in engines for step in backend.steps)
    assert all(backend.steps for _, backend in engines)


def test_steps_that_overlap_run_apart_too() -> None:
    """As on a GPU, where the next step is queued before the tokens of the last are known."""
    wanted = asks()
    found = {}
    for name in STRATEGIES:
        engine, runner, _ = paged_engine(
            TABLE,
            (),
            vocab_size=VOCAB_SIZE,
            max_batch=SLOTS,
            max_len=MAX_LEN,
            num_blocks=SLOTS * MAX_LEN // 4 + 1,
            share_prefixes=False,
        )
        launched: list[int] = []
        launch = runner.launch

        def watched(chunks: Any, seen: list[int] = launched, inner: Any = launch) -> Any:
            seen.append(len(chunks))
            return inner(chunks)

        runner.launch = watched  # type: ignore[method-assign]
        found[name] = run_strategy(name, engine, wanted, SLOTS).token_ids
        assert (max(launched) == 1) == (name in ("sequential", "concurrent"))
        engine.check()
    assert all(tokens == found["sequential"] for tokens in found.values())


def test_a_graph_that_fails_ends_the_run_with_its_error() -> None:
    engine, backend = watched_engine(SLOTS)
    backend.failure = RuntimeError("broken")
    with pytest.raises(BackendError, match="broken"):
        run_strategy("continuous", engine, asks(), SLOTS)


def test_one_at_a_time_is_sequential_and_concurrent_has_the_most_slots() -> None:
    assert sizes(STRATEGIES, [1, 4, 8]) == {
        1: ["sequential"],
        4: ["static", "continuous"],
        8: ["concurrent", "static", "continuous"],
    }
    assert sizes(["continuous"], [1, 2]) == {1: ["continuous"], 2: ["continuous"]}
    assert sizes(["concurrent"], [1, 2]) == {2: ["concurrent"]}
    assert sizes(["sequential"], [4]) == {1: ["sequential"]}


def test_slots_in_use_rise_only_when_requests_come() -> None:
    run, _ = ran("static", asks())
    held = [value for _, value in run.occupancy]
    rises = [i for i, (before, after) in enumerate(pairwise(held)) if after > before]
    assert len(rises) == 2  # 11 requests are 3 batches of 4
    assert max(held) == SLOTS
