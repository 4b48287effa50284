"""A request ends at its deadline wherever it is, with the text that it has got by then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models

from llama_runtime.backends.fake import Fake
from llama_runtime.contract import MIN_CHUNK, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.engine_group import EngineGroup
from llama_runtime.errors import CaravanError, DeadlineError
from llama_runtime.host_masks import HostMasks
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import SamplingParams
from llama_runtime.runner import HostRunner
from llama_runtime.sampler import Sampler
from llama_runtime.sampling import Reference
from llama_runtime.scheduler import Scheduler
from llama_runtime.step_batch import StepBatch

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
VOCAB_SIZE, MAX_LEN = 97, 160


class Clock:
    """Stands still until it is told a time."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["one engine", "a group"])
def make(request: pytest.FixtureRequest, clock: Clock) -> Callable[[int], Engine | EngineGroup]:
    def engine(slots: int) -> Engine | EngineGroup:
        backend = Fake(slots, cache_capacity(MAX_LEN, MIN_CHUNK), VOCAB_SIZE)
        made = Engine(
            HostRunner(
                backend,
                StepBatch(slots, MIN_CHUNK),
                Sampler(Reference(), ()),
                HostMasks(VOCAB_SIZE),
            ),
            Scheduler(SlotCache(slots, MAX_LEN), prompt_budget=MIN_CHUNK, max_chunk=MIN_CHUNK),
            TABLE,
            (),
            vocab_size=VOCAB_SIZE,
            max_len=MAX_LEN,
            clock=clock,
        )
        return made if request.param == "one engine" else EngineGroup([made], clock=clock)

    return engine


def params(deadline: float | None = None, max_tokens: int = 20) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, deadline=deadline, ignore_eos=True)


def test_one_that_runs_ends_with_the_tokens_it_has(
    make: Callable[[int], Engine | EngineGroup], clock: Clock
) -> None:
    engine = make(2)
    late, other = engine.add([1, 2], params(5.0)), engine.add([3], params())
    for _ in range(6):
        engine.step()
    clock.now += 4.9
    engine.step()
    assert late.finish_reason is None
    count = late.num_completion_tokens
    assert count > 0
    clock.now += 0.2
    events = engine.step()
    (last,) = (event for event in events if event.sequence_id == late.id)
    assert (last.token_id, last.finish_reason) == (None, "error")
    assert isinstance(last.error, DeadlineError)
    assert isinstance(last.error, TimeoutError)
    assert str(last.error) == f"the request has {count} tokens at its deadline of 5.0 s"
    assert (late.num_completion_tokens, late.slot) == (count, None)
    while engine.has_work:
        engine.step()
    assert other.num_completion_tokens == 20
    assert engine.counters().late == 1
    engine.check()


def test_one_that_waits_ends_without_a_slot(
    make: Callable[[int], Engine | EngineGroup], clock: Clock
) -> None:
    engine = make(1)
    engine.add([1], params())
    engine.step()
    late, patient = engine.add([2], params(1.0)), engine.add([3], params())
    engine.step()
    clock.now += 2
    (last,) = (event for event in engine.step() if event.sequence_id == late.id)
    assert str(last.error) == "the request waits for a slot at its deadline of 1.0 s"
    assert (engine.num_waiting, late.finish_reason) == (1, "error")
    while engine.has_work:
        engine.step()
    assert patient.finish_reason == "length"
    engine.check()


def test_a_deadline_of_nothing_is_late_at_once(
    make: Callable[[int], Engine | EngineGroup],
) -> None:
    engine = make(1)
    seq = engine.add([1], params(0))
    (event,) = engine.step()
    assert (event.sequence_id, event.finish_reason) == (seq.id, "error")
    assert not engine.has_work


def test_one_that_is_given_up_is_not_late_as_well(
    make: Callable[[int], Engine | EngineGroup], clock: Clock
) -> None:
    engine = make(1)
    running, waiting = engine.add([1], params(1.0)), engine.add([2], params(1.0))
    engine.step()
    engine.abort(running.id)
    engine.abort(waiting.id)
    clock.now += 5
    assert engine.step() == []
    assert engine.counters().late == 0


def test_the_deadline_counts_from_the_arrival(
    make: Callable[[int], Engine | EngineGroup], clock: Clock
) -> None:
    engine = make(1)
    clock.now += 1000
    seq = engine.add([1], params(10.0))
    engine.step()
    assert seq.finish_reason is None


def test_the_error_is_a_caravan_error() -> None:
    assert issubclass(DeadlineError, CaravanError)
