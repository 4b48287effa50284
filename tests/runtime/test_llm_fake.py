"""What the facade promises, over the fake backend: order, slots, and no use after fork."""

from __future__ import annotations

import os
from threading import Thread

import pytest

from llama_runtime.errors import CaravanError
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams

PARAMS = [SamplingParams(max_tokens=1 + 7 * i % 23, ignore_eos=True) for i in range(12)]
PROMPTS = [f"prompt {i}" for i in range(12)]


def test_completions_come_in_the_order_of_the_prompts_whatever_ends_first(fake_llm: LLM) -> None:
    together = fake_llm.generate(PROMPTS, PARAMS)
    alone = [fake_llm.generate(prompt, one)[0] for prompt, one in zip(PROMPTS, PARAMS, strict=True)]
    assert [done.token_ids for done in together] == [done.token_ids for done in alone]
    assert len({tuple(done.token_ids) for done in alone}) == len(alone)


def test_a_closed_stream_frees_its_slot(fake_llm: LLM) -> None:
    fake_llm.generate(PROMPTS, PARAMS)  # so that sequences and slots have other numbers
    with fake_llm.stream("a", SamplingParams(max_tokens=100, ignore_eos=True)) as stream:
        next(stream)
        assert fake_llm.stats().running == 1
    assert fake_llm.stats().running == 0


def test_every_event_of_streams_that_share_steps_reaches_its_own(fake_llm: LLM) -> None:
    prompts, params = PROMPTS[:4], SamplingParams(max_tokens=20, ignore_eos=True)
    streams = [fake_llm.stream(prompt, params) for prompt in prompts]
    events = [list(stream) for stream in streams]
    tokens = [[event.token_id for event in of_one] for of_one in events]
    assert tokens == [done.token_ids for done in fake_llm.generate(prompts, params)]
    assert all(len(of_one) == 20 for of_one in tokens)


def test_a_process_that_did_not_load_the_model_is_refused(
    fake_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a fork, where another thread may hold the lock for ever."""
    own = os.getpid()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: own + 1)
        for use in (
            lambda: fake_llm.generate("a", PARAMS[0]),
            lambda: fake_llm.stream("a", PARAMS[0]),
            fake_llm.stats,
        ):
            with pytest.raises(CaravanError, match="after fork: load it in the child process"):
                use()
    assert fake_llm.generate("a", PARAMS[0])


def test_who_waits_for_a_stream_that_another_thread_closes_is_told_its_end(fake_llm: LLM) -> None:
    """And doesn't go on stepping an engine that has nothing to do."""
    stream = fake_llm.stream("a", SamplingParams(max_tokens=200, ignore_eos=True))
    assert next(stream).token_id is not None
    for seq in stream._seqs:  # as close does, while the reader is past its look at what runs
        fake_llm._engine.drop(seq)
    rest: list[object] = []
    reader = Thread(target=lambda: rest.extend(stream), daemon=True)
    reader.start()
    reader.join(timeout=20)
    assert not reader.is_alive()
    assert rest == []
    assert fake_llm.stats().running == 0
