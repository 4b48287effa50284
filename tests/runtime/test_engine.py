"""The engine by hand: add, step, abort, and every way in which a sequence can end."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tokenizers

from llama_runtime.backends.fake import Fake
from llama_runtime.contract import MIN_CHUNK, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError, CapacityError, CaravanError, RequestError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step

VOCAB_SIZE, MAX_LEN, MAX_CHUNK = 512, 200, 64
EOS, EOT = 2, 400
Script = Callable[[Sequence], int | float]


class Scripted:
    """A backend whose likeliest token a function of the sequence names.

    A token id makes it likeliest; a float fills the row.
    """

    row_multiple = 1

    def __init__(self, script: Script) -> None:
        self._script = script
        self.failure: Exception | None = None
        self.num_steps = 0
        self.num_closes = 0
        self.cleaned: list[tuple[int, int]] = []

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        self.num_steps += 1
        if self.failure is not None:
            raise self.failure
        logits = np.zeros((len(step.logits_rows), VOCAB_SIZE), np.float32)
        sampled = [chunk.seq for chunk in step.chunks if chunk.samples]
        for row, seq in zip(logits, sampled, strict=False):
            said = self._script(seq)
            if isinstance(said, float):
                row.fill(said)
            else:
                row[said] = 50
        return logits

    def clean(self, slot: int, num_tokens: int) -> None:
        self.cleaned.append((slot, num_tokens))

    def close(self) -> None:
        self.num_closes += 1


def spell(text: str) -> Script:
    """Say the letters of a text, whatever the prompt."""
    return lambda seq: byte_id(text[seq.num_completion_tokens])


def byte_id(letter: str) -> int:
    """The id of a printable ASCII character in the byte tokenizer's vocabulary."""
    return 3 + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()).index(letter)


@pytest.fixture(scope="module")
def table(byte_tokenizer: tokenizers.Tokenizer) -> TokenBytes:
    return TokenBytes(byte_tokenizer)


@pytest.fixture
def make(table: TokenBytes) -> Callable[..., Engine]:
    def make(backend: Any, max_batch: int = 4, **options: Any) -> Engine:
        return slots_engine(
            backend,
            table,
            [EOS, EOT],
            vocab_size=VOCAB_SIZE,
            max_batch=max_batch,
            max_len=MAX_LEN,
            prompt_budget=2 * MAX_CHUNK,
            max_chunk=MAX_CHUNK,
            **options,
        )

    return make


def drain(engine: Engine) -> dict[int, list[TokenEvent]]:
    """Step until nothing is left; the events of each sequence."""
    events: dict[int, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.sequence_id, []).append(event)
        engine.check()
    return events


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **options)


# --- ends ---------------------------------------------------------------------------------------


def test_a_sequence_ends_at_max_tokens(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("hello")))
    seq = engine.add([5, 6], greedy(3))
    events = drain(engine)[seq.id]
    assert [event.text for event in events] == ["h", "e", "l"]
    assert [event.token_id for event in events] == [byte_id(c) for c in "hel"]
    assert [event.finish_reason for event in events] == [None, None, "length"]
    assert seq.finish_reason == "length"
    assert seq.completion_token_ids == [byte_id(c) for c in "hel"]
    assert seq.token_ids[:2] == [5, 6]


@pytest.mark.parametrize("end", [EOS, EOT])
def test_every_end_token_of_the_model_ends_and_is_no_text(
    make: Callable[..., Engine], end: int
) -> None:
    ids = [byte_id("h"), byte_id("i"), end]
    engine = make(Scripted(lambda seq: ids[seq.num_completion_tokens]))
    seq = engine.add([5], greedy(50))
    events = drain(engine)[seq.id]
    assert seq.completion_token_ids == ids
    assert "".join(event.text for event in events) == "hi"
    assert (events[-1].token_id, events[-1].finish_reason) == (end, "stop")


def test_stop_tokens_end_and_are_no_text_even_if_they_spell_some(
    make: Callable[..., Engine],
) -> None:
    engine = make(Scripted(spell("stop!")))
    stopped = engine.add([5], greedy(5, stop_token_ids=frozenset({byte_id("o"), byte_id("!")})))
    whole = engine.add([5], greedy(5))
    events = drain(engine)
    assert "".join(event.text for event in events[stopped.id]) == "st"
    assert stopped.completion_token_ids[-1] == byte_id("o")
    assert stopped.finish_reason == "stop"
    assert "".join(event.text for event in events[whole.id]) == "stop!"


def test_ignore_eos_goes_on_past_end_tokens_but_not_past_stop_tokens(
    make: Callable[..., Engine],
) -> None:
    ids = [byte_id("a"), EOS, EOT, byte_id("b"), byte_id("c")]
    engine = make(Scripted(lambda seq: ids[seq.num_completion_tokens]))
    params = greedy(5, ignore_eos=True)
    on = engine.add([5], params)
    stopped = engine.add([5], greedy(5, ignore_eos=True, stop_token_ids=frozenset({EOT})))
    events = drain(engine)
    assert on.completion_token_ids == ids
    assert "".join(event.text for event in events[on.id]) == "abc"  # end tokens spell nothing
    assert on.finish_reason == "length"
    assert stopped.completion_token_ids == ids[:3]
    assert stopped.finish_reason == "stop"


def test_an_end_token_at_max_tokens_is_a_stop(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(lambda _: EOS))
    seq = engine.add([5], greedy(1))
    drain(engine)
    assert (seq.finish_reason, seq.completion_token_ids) == ("stop", [EOS])


def test_an_end_token_in_the_prompt_ends_nothing(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("ab")))
    seq = engine.add([EOS, 5, EOT], greedy(2))
    drain(engine)
    assert seq.finish_reason == "length"


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_text_that_ends_inside_a_character_shows_it_as_replaced(
    make: Callable[..., Engine], table: TokenBytes, reason: str
) -> None:
    first, second = (
        [table.bytes_of(i) for i in range(len(table))].index(b) for b in (b"\xc3", b"\xa9")
    )
    ids = [first, second, first, EOS]
    engine = make(Scripted(lambda seq: ids[seq.num_completion_tokens]))
    seq = engine.add([5], greedy(3 if reason == "length" else 4))
    events = drain(engine)[seq.id]
    assert [event.text for event in events][:2] == ["", "é"]
    assert "".join(event.text for event in events) == "é\ufffd"
    assert seq.finish_reason == reason


# --- refusals -----------------------------------------------------------------------------------


def test_an_empty_prompt_is_refused(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("")))
    with pytest.raises(RequestError, match="the prompt is empty") as refusal:
        engine.add([], greedy(1))
    assert refusal.value.param == "prompt"
    assert not engine.has_work


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "param"),
    [
        (MAX_LEN, 1, "prompt"),
        (5000, 1, "prompt"),
        (MAX_LEN - 1, 2, "max_tokens"),
        (1, 5000, "max_tokens"),
    ],
)
def test_a_request_over_max_len_is_refused_with_the_numbers(
    make: Callable[..., Engine], num_prompt_tokens: int, max_tokens: int, param: str
) -> None:
    engine = make(Scripted(spell("")))
    with pytest.raises(CapacityError) as refusal:
        engine.add([0] * num_prompt_tokens, greedy(max_tokens))
    message = str(refusal.value)
    numbers = (num_prompt_tokens, max_tokens, num_prompt_tokens + max_tokens, MAX_LEN)
    assert all(str(number) in message for number in numbers)
    assert refusal.value.param == param


def test_a_request_of_exactly_max_len_runs(make: Callable[..., Engine]) -> None:
    engine = make(Fake(4, cache_capacity(MAX_LEN, MAX_CHUNK), VOCAB_SIZE))
    seqs = [
        engine.add([7] * n, greedy(MAX_LEN - n, ignore_eos=True)) for n in (1, 100, MAX_LEN - 1)
    ]
    drain(engine)
    assert [seq.num_tokens for seq in seqs] == [MAX_LEN] * 3


@pytest.mark.parametrize("prompt", [[-1], [5, VOCAB_SIZE], [2**70], [5, -(2**70)]])
def test_ids_out_of_range_are_refused_with_the_range(
    make: Callable[..., Engine], prompt: list[int]
) -> None:
    engine = make(Scripted(spell("")))
    with pytest.raises(RequestError, match=r"must lie in 0 to 511, not ") as refusal:
        engine.add(prompt, greedy(1))
    assert refusal.value.param == "prompt"


@pytest.mark.parametrize("prompt", ["text", [5, "6"], [1.5], [None], None, 7, [[5]], np.zeros(2)])
def test_ids_that_are_no_whole_numbers_are_refused(
    make: Callable[..., Engine], prompt: Any
) -> None:
    engine = make(Scripted(spell("")))
    with pytest.raises(RequestError, match="must be a list of whole numbers") as refusal:
        engine.add(prompt, greedy(1))
    assert refusal.value.param == "prompt"


def test_ids_may_come_from_numpy_and_become_plain_numbers(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("a")))
    seq = engine.add(np.array([5, VOCAB_SIZE - 1]), greedy(1))  # type: ignore[arg-type]
    assert [type(token_id) for token_id in seq.token_ids] == [int, int]
    assert seq.token_ids == [5, VOCAB_SIZE - 1]


def test_the_callers_list_is_not_kept(make: Callable[..., Engine]) -> None:
    engine, prompt = make(Scripted(spell("ab"))), [5, 6]
    seq = engine.add(prompt, greedy(2))
    prompt.append(7)
    drain(engine)
    assert (seq.num_prompt_tokens, seq.num_tokens, prompt) == (2, 4, [5, 6, 7])


# --- steps --------------------------------------------------------------------------------------


def test_a_step_without_work_runs_nothing(make: Callable[..., Engine]) -> None:
    backend = Scripted(spell("a"))
    engine = make(backend)
    assert engine.step() == []
    assert not engine.has_work
    assert backend.num_steps == 0


def test_counts_follow_what_waits_and_runs(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("abcdef")), max_batch=2)
    for max_tokens in (1, 3, 2):
        engine.add([5], greedy(max_tokens))
    counts = []
    while engine.has_work:
        counts.append((engine.num_waiting, engine.num_running))
        engine.step()
    assert counts == [(3, 0), (1, 1), (0, 2)]
    assert (engine.num_waiting, engine.num_running) == (0, 0)


def test_a_long_prompt_gives_no_event_until_its_last_chunk_has_run(
    make: Callable[..., Engine],
) -> None:
    engine = make(Scripted(spell("a")))
    seq = engine.add([5] * 150, greedy(1))
    events = [engine.step() for _ in range(3)]
    assert events[:2] == [[], []]
    assert [event.sequence_id for event in events[2]] == [seq.id]


def test_running_streams_get_a_token_in_every_other_step_beside_a_long_prompt(
    make: Callable[..., Engine],
) -> None:
    backend = Fake(4, cache_capacity(MAX_LEN, MIN_CHUNK), VOCAB_SIZE)
    engine = make(backend)
    streams = [engine.add([5 + i], greedy(40, ignore_eos=True)) for i in range(3)]
    engine.step()
    long = engine.add([9] * 190, greedy(2, ignore_eos=True))
    while long.cache_len < long.num_prompt_tokens:
        events = engine.step() + engine.step()
        tokens = {event.sequence_id: event.token_id for event in events}
        assert all(tokens.get(seq.id) is not None for seq in streams)


def test_a_freed_slot_is_refilled_in_the_same_run(make: Callable[..., Engine]) -> None:
    lengths = [1, 20, 1, 20, 1, 20, 1, 20]

    def num_steps(**options: Any) -> int:
        backend = Scripted(lambda _: byte_id("a"))
        engine = make(backend, max_batch=2, **options)
        for length in lengths:
            engine.add([5], greedy(length))
        drain(engine)
        return backend.num_steps

    assert num_steps() == 43  # 84 tokens: both slots are busy to the end, but for one step
    assert num_steps(refill=False) == 4 * 20


def test_a_seed_is_drawn_for_who_gives_none_and_recorded(make: Callable[..., Engine]) -> None:
    def run(seed: int | None) -> Sequence:
        engine = make(Fake(4, cache_capacity(MAX_LEN, MAX_CHUNK), VOCAB_SIZE))
        params = SamplingParams(max_tokens=20, temperature=2.0, seed=seed, ignore_eos=True)
        seq = engine.add([5, 6, 7], params)
        drain(engine)
        return seq

    first, second = run(None), run(None)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    assert run(first.seed).token_ids == first.token_ids
    assert run(0).seed == 0


# --- aborts and failures ------------------------------------------------------------------------


def test_aborting_frees_the_slot_of_a_running_sequence(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("abcdef")), max_batch=1)
    first, second = engine.add([5], greedy(5)), engine.add([5], greedy(2))
    engine.step()
    engine.abort(first.id)
    engine.check()
    assert (first.finish_reason, first.slot, second.slot) == ("abort", None, None)
    events = drain(engine)
    assert events.keys() == {second.id}
    assert first.num_completion_tokens == 1


def test_aborting_takes_a_waiting_sequence_out_of_the_queue(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("abcdef")), max_batch=1)
    first, second, third = (engine.add([5], greedy(2)) for _ in range(3))
    engine.step()
    engine.abort(second.id)
    engine.check()
    assert (second.finish_reason, engine.num_waiting) == ("abort", 1)
    assert drain(engine).keys() == {first.id, third.id}


def test_aborting_a_prompt_half_way_leaves_nothing_behind(make: Callable[..., Engine]) -> None:
    backend = Fake(1, cache_capacity(MAX_LEN, MAX_CHUNK), VOCAB_SIZE)
    engine = make(backend, max_batch=1)
    half = engine.add([5] * 150, greedy(2))
    engine.step()
    assert 0 < half.cache_len < 150
    engine.abort(half.id)
    after = engine.add([6, 7], greedy(5, ignore_eos=True))
    drain(engine)
    alone = make(Fake(1, cache_capacity(MAX_LEN, MAX_CHUNK), VOCAB_SIZE), max_batch=1)
    expected = alone.add([6, 7], greedy(5, ignore_eos=True))
    drain(alone)
    assert after.token_ids == expected.token_ids


def test_aborting_unknown_and_ended_sequences_does_nothing(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("abc")))
    seq = engine.add([5], greedy(1))
    engine.abort(seq.id + 1)
    engine.abort(-1)
    drain(engine)
    engine.abort(seq.id)
    assert seq.finish_reason == "length"
    engine.check()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_end_only_their_sequence(
    make: Callable[..., Engine], value: float, temperature: float
) -> None:
    def script(seq: Sequence) -> int | float:
        broken = seq.token_ids[0] == 9 and seq.num_completion_tokens == 1
        return float(value) if broken else byte_id("a")

    engine = make(Scripted(script))
    params = SamplingParams(max_tokens=3, temperature=temperature, top_k=1)
    first, broken, last = (engine.add([token_id], params) for token_id in (5, 9, 6))
    events = drain(engine)
    assert [seq.finish_reason for seq in (first, last)] == ["length", "length"]
    assert [event.text for event in events[first.id]] == ["a", "a", "a"]
    assert broken.finish_reason == "error"
    assert broken.completion_token_ids == [byte_id("a")]
    end = events[broken.id][-1]
    assert (end.token_id, end.finish_reason) == (None, "error")
    assert isinstance(end.error, BackendError)
    assert "not finite" in str(end.error)
    assert engine.failure is None
    drain_again = engine.add([5], greedy(1))
    drain(engine)
    assert drain_again.finish_reason == "length"


def test_a_failing_backend_fails_all_in_flight_and_stops_the_engine(
    make: Callable[..., Engine],
) -> None:
    backend = Scripted(spell("abcdef"))
    engine = make(backend, max_batch=2)
    seqs = [engine.add([5], greedy(5)) for _ in range(3)]
    engine.step()
    backend.failure = BackendError("the graph failed: out of luck")
    events = engine.step()
    assert sorted(event.sequence_id for event in events) == [seq.id for seq in seqs]
    assert all(event.error is backend.failure for event in events)
    assert all((event.token_id, event.finish_reason) == (None, "error") for event in events)
    assert [seq.finish_reason for seq in seqs] == ["error"] * 3
    engine.check()
    assert not engine.has_work
    assert engine.step() == []
    with pytest.raises(BackendError, match="out of luck"):
        engine.add([5], greedy(1))
    assert backend.num_steps == 4  # the step itself, and each of the two running ones alone


def test_a_backend_that_fails_in_a_way_of_its_own_stops_the_engine_too(
    make: Callable[..., Engine],
) -> None:
    backend = Scripted(spell("abcdef"))
    engine = make(backend, max_batch=2)
    for _ in range(2):
        engine.add([5], greedy(5))
    backend.failure = MemoryError("no room")
    for event in engine.step():
        assert isinstance(event.error, BackendError)
        assert event.error.__cause__ is backend.failure
        assert "no room" in str(event.error)
    engine.check()
    with pytest.raises(BackendError, match=r"the engine has stopped: .*no room"):
        engine.add([5], greedy(1))


def test_closing_aborts_what_is_left_and_closes_the_backend_once(
    make: Callable[..., Engine],
) -> None:
    backend = Scripted(spell("abc"))
    engine = make(backend, max_batch=1)
    seqs: Seq[Sequence] = [engine.add([5], greedy(3)) for _ in range(2)]
    engine.step()
    engine.close()
    engine.close()
    assert [seq.finish_reason for seq in seqs] == ["abort", "abort"]
    assert backend.num_closes == 1
    engine.check()
    with pytest.raises(CaravanError, match="the engine is closed"):
        engine.add([5], greedy(1))


def test_check_finds_a_sequence_that_nobody_runs(make: Callable[..., Engine]) -> None:
    engine = make(Scripted(spell("abc")))
    seq = engine.add([5], greedy(3))
    engine._scheduler.waiting.remove(seq)
    with pytest.raises(RuntimeError, match="1 sequences, but 0 wait or run"):
        engine.check()
