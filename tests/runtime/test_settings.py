"""What a caller sets at loading reaches the engine, or is refused by name."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama_runtime import LLM, AsyncLLM, RequestError, SamplingParams, Settings, load, loading
from llama_runtime.bundle import open_bundle
from llama_runtime.engine import Engine
from llama_runtime.loading import PROMPT_BUDGET


def scheduler_of(llm: LLM) -> Any:
    return llm._engine._engine._scheduler  # type: ignore[attr-defined]


@pytest.mark.parametrize(("given", "used"), [(None, 33), (33, 33), (64, 64), (256, 256)])
def test_the_budget_beside_streams_is_the_one_asked_for(
    fake_backend: None, fake_bundle: Path, given: int | None, used: int
) -> None:
    with LLM(fake_bundle, max_len=64, threads=1, stream_budget=given) as llm:
        assert scheduler_of(llm)._stream_budget == used


@pytest.mark.parametrize("wrong", [0, 32, PROMPT_BUDGET + 1, True, 64.0, "64"])
def test_a_budget_that_could_not_be_kept_is_refused(
    fake_backend: None, fake_bundle: Path, wrong: Any
) -> None:
    with pytest.raises(RequestError, match="stream_budget must lie in 33 to 256, not") as caught:
        LLM(fake_bundle, max_len=64, threads=1, stream_budget=wrong)
    assert caught.value.param == "stream_budget"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (Settings(prefix_tokens=32), "prefix_tokens"),
        (Settings(stream_budget=128), "stream_budget"),
    ],
)
def test_what_tensorrt_has_no_use_for_is_refused(
    fake_bundle: Path, settings: Settings, name: str
) -> None:
    device: Any = object()
    with pytest.raises(RequestError, match=f"{name} must be left out") as caught:
        loading._plan_tensorrt(open_bundle(fake_bundle), settings, [device])
    assert caught.value.param == name


def test_an_engine_stepped_by_hand_is_that_of_the_facade(
    fake_backend: None, fake_bundle: Path
) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    with LLM(fake_bundle, max_batch=2, max_len=64) as llm:
        expected = llm.generate("Hello", params)[0].token_ids
    loaded = load(fake_bundle, Settings(max_batch=2, max_len=64))
    assert (loaded.engine.max_len, loaded.memory_plan.max_batch) == (64, 2)
    loaded.engine.add(loaded.encoder.encode("Hello"), params)
    token_ids = []
    while loaded.engine.has_work:
        token_ids += [event.token_id for event in loaded.engine.step()]
    loaded.engine.close()
    assert token_ids == expected


def test_streams_are_known_to_be_read_and_others_not(
    fake_backend: None, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed: list[bool] = []
    enqueue = Engine.enqueue

    def noted(self: Engine, seq: Any) -> None:
        streamed.append(seq.streamed)
        enqueue(self, seq)

    monkeypatch.setattr(Engine, "enqueue", noted)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    with LLM(fake_bundle, max_len=64, threads=1) as llm:
        llm.generate([[1], [2]], params)
        list(llm.stream([1], params))
    assert streamed == [False, False, True]

    async def use() -> None:
        async with AsyncLLM(fake_bundle, max_len=64, threads=1) as llm:
            await llm.generate([1], params)
            async with llm.stream([1], params) as stream:
                async for _ in stream:
                    pass

    streamed.clear()
    asyncio.run(use())
    assert streamed == [False, True]


def test_requests_of_one_call_are_one_caller_unless_they_name_another(
    fake_backend: None, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: list[Any] = []
    enqueue = Engine.enqueue

    def noted(self: Engine, seq: Any) -> None:
        callers.append(seq.caller)
        enqueue(self, seq)

    monkeypatch.setattr(Engine, "enqueue", noted)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    named = SamplingParams(max_tokens=2, ignore_eos=True, caller="somebody")

    async def use() -> None:
        async with AsyncLLM(fake_bundle, max_len=64, threads=1) as llm:
            streams = [llm.stream([1], params), llm.stream([1], params)]
            await llm.generate([[1], [2], [3]], [params, params, named])
            for stream in streams:
                async for _ in stream:
                    pass

    asyncio.run(use())
    counts = Counter(callers)
    assert counts.pop(("named", "somebody")) == 1
    assert sorted(counts.values()) == [1, 1, 2]  # two streams, and the rest of one call


def test_an_engine_knows_no_other_word_about_a_sequence(
    fake_backend: None, fake_bundle: Path
) -> None:
    with LLM(fake_bundle, max_len=64, threads=1) as llm:
        engine: Any = llm._engine._engine
        with pytest.raises(TypeError, match="smaple"):
            engine.add([1], SamplingParams(), smaple=0)
