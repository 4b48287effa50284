"""A fault ends the sequence that it belongs to and no other; if it belongs to all, all are told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, decoders, models

from llama_runtime.backends.base import Backend
from llama_runtime.backends.fake import Fake
from llama_runtime.backends.faulty import Faulty
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.bundle import open_bundle
from llama_runtime.contract import MAX_DRAFT, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.sampling import Int64s, Kernels, Logits, Reference
from llama_runtime.sequence import Sequence
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step

MAX_BATCH, MAX_LEN, MAX_CHUNK, VOCAB_SIZE = 3, 128, 64, 97
BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
PROMPTS = [[7], [1, 2, 3], [5] * 40, [9] * 70, [4, 4], [8] * 33, [6]]
WARM = SamplingParams(max_tokens=9, temperature=2.0, top_k=40, seed=5)


def fake() -> Fake:
    return Fake(MAX_BATCH, cache_capacity(MAX_LEN, MAX_CHUNK), VOCAB_SIZE)


def engine_of(backend: Backend, kernels: Kernels | None = None, **options: Any) -> Engine:
    return slots_engine(
        backend,
        TokenBytes(BYTE_LEVEL),
        (),
        **{
            "vocab_size": VOCAB_SIZE,
            "max_batch": MAX_BATCH,
            "max_len": MAX_LEN,
            "prompt_budget": 2 * MAX_CHUNK,
            "max_chunk": MAX_CHUNK,
            "kernels": kernels,
            **options,
        },
    )


def add_all(engine: Engine, params: SamplingParams = WARM) -> list[Sequence]:
    return [engine.add(prompt, params) for prompt in PROMPTS]


def drain(engine: Engine) -> list[TokenEvent]:
    events = []
    while engine.has_work:
        events += engine.step()
        engine.check()
    return events


def check_told(events: list[TokenEvent], seqs: list[Sequence]) -> None:
    """Every token has had its event, and every end."""
    for seq in seqs:
        own = [event for event in events if event.sequence_id == seq.id]
        tokens = [event.token_id for event in own if event.token_id is not None]
        assert tokens == seq.completion_token_ids
        assert [e.finish_reason for e in own if e.finish_reason] == [seq.finish_reason]


@pytest.fixture(scope="module")
def right() -> list[list[int]]:
    """The tokens of each prompt without any fault."""
    engine = engine_of(fake())
    seqs = add_all(engine)
    drain(engine)
    return [seq.completion_token_ids for seq in seqs]


def check_only(victim: int, seqs: list[Sequence], right: list[list[int]]) -> None:
    """The victim ended in an error, and all others as if it had not been there."""
    for seq, tokens in zip(seqs, right, strict=True):
        if seq.id == victim:
            assert seq.finish_reason == "error"
            assert seq.completion_token_ids == tokens[: seq.num_completion_tokens]
        else:
            assert (seq.finish_reason, seq.completion_token_ids) == ("length", tokens)


# --- of one sequence ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raise", "nan"])
@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("victim", range(len(PROMPTS)))
def test_a_fault_of_one_ends_only_that_one(
    right: list[list[int]], victim: int, first: int, kind: Any
) -> None:
    engine = engine_of(Faulty(fake(), {first: kind}, victim=victim))
    seqs = add_all(engine)
    events = drain(engine)
    check_only(victim, seqs, right)
    check_told(events, seqs)
    (failed,) = (event for event in events if event.error is not None)
    assert (failed.sequence_id, failed.finish_reason) == (victim, "error")
    assert isinstance(failed.error, BackendError)
    assert engine.failure is None
    again = engine.add(PROMPTS[0], WARM)
    drain(engine)
    assert again.completion_token_ids == right[0]


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 20])  # in step 2 there is one sequence alone
def test_a_fault_that_does_not_come_again_harms_nobody(right: list[list[int]], number: int) -> None:
    engine = engine_of(Faulty(fake(), {number: "raise"}))
    seqs = add_all(engine)
    check_told(drain(engine), seqs)
    check_only(-1, seqs, right)


def test_two_faulty_ones_of_a_step_end_both_with_their_own_errors(right: list[list[int]]) -> None:
    class Picky(Faulty):
        def run(self, step: Step) -> npt.NDArray[np.float32]:
            bad = [chunk.seq.id for chunk in step.chunks if chunk.seq.id in (0, 1)]
            if bad:
                raise BackendError(f"{bad} can't run")
            return super().run(step)

    engine = engine_of(Picky(fake(), {}))
    seqs = add_all(engine)
    errors = {e.sequence_id: str(e.error) for e in drain(engine) if e.error is not None}
    assert errors == {0: "[0] can't run", 1: "[1] can't run"}
    assert [s.completion_token_ids for s in seqs[2:]] == right[2:]


# --- of all -------------------------------------------------------------------------------------


def test_a_fault_of_all_tells_all_and_stops_the_engine() -> None:
    faults = dict.fromkeys(range(4, 99), "raise")
    backend = Faulty(fake(), faults)  # type: ignore[arg-type]
    engine = engine_of(backend)
    seqs = add_all(engine)
    events = drain(engine)
    errors = {e.sequence_id: e.error for e in events if e.error is not None}
    assert errors.keys() == {seq.id for seq in seqs if seq.finish_reason == "error"}
    assert len(errors) == len(PROMPTS)  # also those that waited
    assert set(errors.values()) == {engine.failure}
    assert str(engine.failure) == "step 4 was told to fail"
    assert backend.num_steps == 5 + MAX_BATCH
    with pytest.raises(BackendError, match="the engine has stopped: step 4"):
        engine.add([1], WARM)


def test_one_alone_is_blamed_once_and_then_the_engine() -> None:
    engine = engine_of(Faulty(fake(), {0: "raise", 1: "raise"}), max_batch=1)
    first, second, third = (engine.add([5], WARM) for _ in range(3))
    (event,) = engine.step()
    assert (event.sequence_id, first.finish_reason) == (first.id, "error")
    assert engine.failure is None
    assert {event.sequence_id for event in engine.step()} == {second.id, third.id}
    assert engine.failure is not None


def test_a_success_between_them_clears_the_engine(right: list[list[int]]) -> None:
    engine = engine_of(Faulty(fake(), {0: "raise", 2: "raise"}), max_batch=1)
    seqs = add_all(engine)
    drain(engine)
    assert [seq.finish_reason for seq in seqs[:3]] == ["error", "error", "length"]
    assert seqs[1].completion_token_ids == right[1][:1]
    assert [seq.completion_token_ids for seq in seqs[2:]] == right[2:]


def test_a_hanging_step_goes_on_when_it_is_released(right: list[list[int]]) -> None:
    backend = Faulty(fake(), {2: "hang"})
    engine = engine_of(backend)
    seqs = add_all(engine)
    thread = threading.Thread(target=drain, args=(engine,), daemon=True)
    thread.start()
    assert backend.hanging.wait(10)
    assert (thread.is_alive(), backend.num_steps) == (True, 3)
    backend.released.set()
    thread.join(10)
    check_only(-1, seqs, right)


# --- cleaning -----------------------------------------------------------------------------------


class Cleaned(Faulty):
    """Notes what is cleaned, and can't do it if it is told so."""

    def __init__(self, *args: Any, fails: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.cleaned: list[tuple[int, int]] = []
        self._fails = fails

    def clean(self, slot: int, num_tokens: int) -> None:
        self.cleaned.append((slot, num_tokens))
        if self._fails:
            raise BackendError("the cache is gone")
        super().clean(slot, num_tokens)


@pytest.mark.parametrize("kind", ["raise", "nan"])
def test_a_slot_is_cleaned_after_a_fault_and_at_no_other_time(
    right: list[list[int]], kind: Any
) -> None:
    backend = Cleaned(fake(), {4: kind}, victim=1)
    engine = engine_of(backend)
    seqs = add_all(engine)
    slots: dict[int, int] = {}
    while engine.has_work:
        slots |= {seq.id: seq.slot for seq in seqs if seq.slot is not None}
        engine.step()
    assert backend.cleaned == [(slots[1], seqs[1].num_tokens + MAX_DRAFT)]
    assert slots[1] in [slots[seq.id] for seq in seqs if seq.id > 1]  # it was used again
    check_only(1, seqs, right)


def test_a_cache_that_can_not_be_cleaned_stops_the_engine() -> None:
    engine = engine_of(Cleaned(fake(), {3: "nan"}, victim=0, fails=True))
    seqs = add_all(engine)
    errors = [event.error for event in drain(engine) if event.error is not None]
    assert [seq.finish_reason for seq in seqs] == ["error"] * len(seqs)
    assert [str(error) for error in errors].count("the cache is gone") == len(seqs) - 1
    assert "not finite" in str(errors[0])
    assert str(engine.failure) == "the cache is gone"
    with pytest.raises(BackendError, match="the engine has stopped: the cache is gone"):
        engine.add([1], WARM)


class Poisoned(Faulty):
    """Writes what is no number into the victim's part of the cache, once, before it is read."""

    def __init__(self, backend: OrtCpu, victim: int) -> None:
        super().__init__(backend, {}, victim=victim)
        self._buffers, self.poisoned = backend._cache, False

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        for chunk in step.chunks:
            if chunk.seq.id == self._victim and chunk.seq.cache_len > 3 and not self.poisoned:
                self.poisoned = True
                for buffer in self._buffers:
                    buffer[chunk.seq.slot, :, : chunk.seq.cache_len] = np.nan
        return super().run(step)


@pytest.mark.parametrize("victim", [1, 3], ids=["in its completion", "in its prompt"])
def test_numbers_in_a_real_cache_that_are_none_harm_nobody_else(
    tiny_bundle: Path, victim: int
) -> None:
    bundle = open_bundle(tiny_bundle)
    geometry = bundle.manifest.geometry
    session = open_session(bundle.graph_path("slots"), threads=1)
    capacity = cache_capacity(MAX_LEN, MAX_CHUNK)
    backends = [OrtCpu(session, geometry, num_slots=MAX_BATCH, capacity=capacity) for _ in range(2)]
    poisoned = Poisoned(backends[1], victim)
    completions = []
    for backend in (backends[0], poisoned):
        engine = engine_of(backend, vocab_size=geometry.vocab_size)
        seqs = add_all(engine)
        drain(engine)
        assert engine.failure is None
        completions.append(seqs)
    assert poisoned.poisoned
    check_only(victim, completions[1], [seq.completion_token_ids for seq in completions[0]])
    assert all(np.isfinite(buffer).all() for buffer in backends[1]._cache)


# --- around the forward -------------------------------------------------------------------------


class Failing(Reference):
    """Can't choose from rows with a top_k of 13."""

    def choose(self, logits: Logits, params: Any, numbers: Any) -> Int64s:
        if any(of_row.top_k == 13 for of_row in params):
            raise ZeroDivisionError("unlucky")
        return super().choose(logits, params, numbers)


def test_a_sampler_that_fails_for_one_ends_only_that_one(right: list[list[int]]) -> None:
    engine = engine_of(fake(), Failing())
    unlucky = SamplingParams(temperature=1, top_k=13, max_tokens=5)
    seqs = [engine.add(PROMPTS[0], WARM), engine.add([1], unlucky), engine.add(PROMPTS[2], WARM)]
    events = drain(engine)
    assert [seq.completion_token_ids for seq in seqs] == [right[0], [], right[2]]
    (error,) = (event.error for event in events if event.error is not None)
    assert seqs[1].finish_reason == "error"
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert "unlucky" in str(error)


def test_a_detokenizer_that_fails_ends_only_its_own_sequence(right: list[list[int]]) -> None:
    class Broken:
        def push(self, _: int) -> str:
            raise ValueError("no such text")

        def finish(self) -> str:
            raise ValueError("no text at all")

    engine = engine_of(fake())
    seqs = add_all(engine)
    for _ in range(3):
        engine.step()
    seqs[1].detokenizer = Broken()  # type: ignore[assignment]
    events = drain(engine)
    check_only(1, seqs, [*right[:1], seqs[1].completion_token_ids, *right[2:]])
    (last,) = (event for event in events if event.error is not None)
    assert "no such text" in str(last.error)
    assert last.text == ""
    assert engine.failure is None
