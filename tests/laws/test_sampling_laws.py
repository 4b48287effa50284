"""Whatever a request asks for, company changes nothing; and a step costs what runs, not what waits.

``test_company`` says the first of the real model; here the fake one lets hundreds of schedules run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_runtime.backends.fake import Fake
from llama_runtime.contract import MIN_CHUNK, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.events import TokenEvent
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.host_masks import HostMasks
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import OPTIONS, SamplingParams
from llama_runtime.runner import HostRunner
from llama_runtime.sampler import Sampler
from llama_runtime.sampling import Reference
from llama_runtime.scheduler import Scheduler
from llama_runtime.sequence import Sequence
from llama_runtime.step_batch import StepBatch

# Few tokens, and those of letters, so that stop texts come up.
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())[:40]
VOCABULARY = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
VOCABULARY.decoder = decoders.ByteLevel()
TABLE = TokenBytes(VOCABULARY)
VOCAB_SIZE, MAX_LEN, END_TOKENS = len(LETTERS), 160, frozenset({2, 3, 4, 5})
CONSTRAINTS: list[dict[str, Any]] = [  # of other letters than the end tokens
    {"json_schema": {"type": "integer"}},
    {"regex": "(AB|[0-9]+C)*D"},
    {"choice": ["ABBA", "AB", "BAD", "1234567"]},
    {"grammar": 'start: "A" start "B" | "C"'},
]
LENGTHS = (1, 2, 5, 9, 14, 20, 33, 34, 66, 98)


@dataclass(frozen=True)
class Outcome:
    """All that a caller sees of one sequence."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_text: str | None
    logprobs: list[Any]
    prompt_logprobs: list[Any]


class Strict(Engine):
    """Raises what goes wrong in a step: run alone, as after a fault, all may be well again."""

    def _isolate(self, _: Any, error: Exception) -> None:
        raise error


def engine_of(slots: int, budget: int = MIN_CHUNK, chunk: int = MIN_CHUNK) -> Engine:
    backend = Fake(slots, cache_capacity(MAX_LEN, chunk), VOCAB_SIZE)
    sampler = Sampler(Reference(), END_TOKENS)
    return Strict(
        HostRunner(
            backend,
            StepBatch(slots, budget, backend.row_multiple),
            sampler,
            HostMasks(VOCAB_SIZE),
        ),
        Scheduler(SlotCache(slots, MAX_LEN), prompt_budget=budget, max_chunk=chunk),
        TABLE,
        END_TOKENS,
        vocab_size=VOCAB_SIZE,
        max_len=MAX_LEN,
        grammars=grammars(),
    )


@cache
def grammars() -> GrammarCompiler:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        VOCABULARY.save(str(path))
        compiler = GrammarCompiler(path, VOCAB_SIZE, END_TOKENS)
        compiler.prepare(SamplingParams(regex="A").constraint)  # which reads the file
    return compiler


@cache
def pool() -> list[tuple[list[int], SamplingParams]]:
    """Prompts with every parameter on in some and off in others."""
    choose, several = random.Random(5), []
    for i in range(40):
        logprobs, prompt_logprobs = choose.random() < 0.5, choose.random() < 0.5
        wanted = choose.choice([0, 3, 20]) if logprobs or prompt_logprobs else 0
        held = choose.choice([{}, *CONSTRAINTS]) if i % 2 else {}
        params = SamplingParams(
            max_tokens=choose.randint(4, 20),
            min_tokens=0 if held else choose.choice([0, 0, 3]),
            temperature=choose.choice([0.0, 0.7, 1.5, 4.0]),
            top_k=choose.choice([0, 0, 5, 30]),
            top_p=choose.choice([1.0, 1.0, 0.8]),
            min_p=choose.choice([0.0, 0.0, 0.05]),
            repetition_penalty=choose.choice([1.0, 1.0, 1.3, 0.7]),
            presence_penalty=choose.choice([0.0, 0.0, 1.0]),
            frequency_penalty=choose.choice([0.0, 0.0, -0.5, 0.5]),
            logit_bias=choose.choice([{}, {}, {7: 3.0, 9: -100.0}]),
            seed=choose.randrange(4),
            n=choose.choice([1, 1, 1, 3]),
            stop=choose.choice([(), (LETTERS[20], LETTERS[13], LETTERS[7] + LETTERS[8])]),
            include_stop=choose.random() < 0.5,
            stop_token_ids=choose.choice([frozenset(), frozenset({11})]),
            ignore_eos=not held and choose.random() < 0.5,
            logprobs=logprobs,
            top_logprobs=wanted,
            prompt_logprobs=prompt_logprobs,
            speculation=choose.choice(["off", "on", "auto"]),
            priority=choose.choice([0, 0, -3, 5]),
            deadline=choose.choice([None, 1e6]),
            caller=choose.choice([None, "one", "another"]),
            cache_salt=choose.choice(["", "theirs"]),
            **held,
        )
        length = LENGTHS[i % len(LENGTHS)]
        several.append(([choose.randrange(VOCAB_SIZE) for _ in range(length)], params))
    return several


def outcome(seq: Sequence, events: list[TokenEvent]) -> Outcome:
    own = [event for event in events if event.sequence_id == seq.id]
    assert [event.token_id for event in own] == seq.completion_token_ids
    assert [e.logprob for e in own if e.logprob is not None] == seq.logprobs
    assert {event.sample for event in own} == {seq.sample}
    return Outcome(
        seq.completion_token_ids,
        "".join(event.text for event in own),
        seq.finish_reason,
        seq.stop_texts.found,
        seq.logprobs,
        seq.prompt_logprobs,
    )


@cache
def alone(index: int, sample: int) -> Outcome:
    """One sample of a request without anybody else, not even its other samples."""
    prompt, params = pool()[index]
    engine, events = engine_of(1), []
    seq = engine.add(prompt, params, sample=sample)
    while engine.has_work:
        events += engine.step()
    return outcome(seq, events)


@settings(max_examples=200)
@given(st.data())
def test_company_changes_nothing_whatever_is_asked_for(data: st.DataObject) -> None:
    engine = engine_of(
        data.draw(st.integers(1, 9)),
        MIN_CHUNK + data.draw(st.integers(0, 100)),
        MIN_CHUNK + data.draw(st.integers(0, 60)),
    )
    chosen = data.draw(st.lists(st.integers(0, len(pool()) - 1), min_size=1, max_size=8))
    arrivals = data.draw(
        st.lists(st.sampled_from([0, 0, 0, 1, 4, 12]), min_size=len(chosen), max_size=len(chosen))
    )
    running: dict[tuple[int, int, int], Sequence] = {}
    events: list[TokenEvent] = []
    for place, (index, steps) in enumerate(zip(chosen, arrivals, strict=True)):
        for _ in range(steps):
            events += engine.step()
        prompt, params = pool()[index]
        for sample in range(params.n):
            running[place, index, sample] = engine.add(prompt, params, sample=sample)
    while engine.has_work:
        events += engine.step()
        engine.check()
    for (_, index, sample), seq in running.items():
        assert outcome(seq, events) == alone(index, sample), pool()[index]


def test_samples_of_a_request_are_all_different_and_the_first_is_that_of_n_1() -> None:
    sampled = 0
    for index, (prompt, params) in enumerate(pool()):
        if params.n == 1:
            continue
        several = [alone(index, sample) for sample in range(params.n)]
        engine, events = engine_of(1), []
        seq = engine.add(prompt, replace(params, n=1))
        while engine.has_work:
            events += engine.step()
        assert outcome(seq, events) == several[0]
        texts = {tuple(found.token_ids) for found in several}
        if params.greedy:
            assert len(texts) == 1
        elif params.constraint or params.temperature <= 1:
            continue
        elif min(len(found.token_ids) for found in several) > 5:
            assert len(texts) == params.n
            sampled += 1
    assert sampled > 1


def test_the_pool_has_every_parameter_on_and_every_end() -> None:
    """So that the laws above are about something."""
    default = SamplingParams()
    for name in OPTIONS:
        values = [getattr(params, name) for _, params in pool()]
        assert any(value != getattr(default, name) for value in values), name
    ends = [alone(index, 0) for index in range(len(pool()))]
    assert sum(end.finish_reason == "length" for end in ends) > 5
    assert sum(end.finish_reason == "stop" and end.stop_text is None for end in ends) > 2
    assert sum(end.stop_text is not None for end in ends) > 2


# --- bookkeeping --------------------------------------------------------------------------------

ENDLESS = SamplingParams(max_tokens=150, ignore_eos=True)


def crowded(waiting: int) -> tuple[Engine, list[Sequence]]:
    """64 that run, and so many that wait."""
    engine = engine_of(64, budget=64)
    seqs = [engine.add([5, 6], ENDLESS) for _ in range(64 + waiting)]
    for _ in range(6):
        engine.step()
    assert (engine.num_running, engine.num_waiting) == (64, waiting)
    return engine, seqs[64:]


def fastest(action: Callable[[], object], times: int) -> float:
    """Seconds of the quickest run, which the rest of the machine disturbed least."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@pytest.mark.alone
def test_a_step_costs_the_same_however_many_wait() -> None:
    few, _ = crowded(100)
    many, _ = crowded(10_000)
    assert fastest(many.step, 20) < 3 * fastest(few.step, 20)


@pytest.mark.alone
@pytest.mark.parametrize("order", ["forwards", "backwards", "mixed"])
def test_giving_up_all_who_wait_takes_time_in_proportion(order: str) -> None:
    def seconds(waiting: int) -> float:
        engine, seqs = crowded(waiting)
        ids = [seq.id for seq in seqs]
        if order == "backwards":
            ids.reverse()
        elif order == "mixed":
            random.Random(0).shuffle(ids)
        started = time.perf_counter()
        for sequence_id in ids:
            engine.abort(sequence_id)
        taken = time.perf_counter() - started
        assert engine.num_waiting == 0
        engine.check()
        return taken

    assert seconds(10_000) < 1.0
    # In proportion it would be 20 times, and 400 times if each looked at all others.
    assert seconds(20_000) < 120 * min(seconds(1_000) for _ in range(3))
