"""Steps that verify guesses: who is in them, what their arrays say, and what becomes of the tokens.

What is guessed is a script here: `PromptLookup.draft` is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llama_runtime.backends.fake import Fake
from llama_runtime.chunk import Chunk
from llama_runtime.contract import (
    MAX_CELLS,
    MAX_DRAFT,
    MAX_VERIFIED,
    MIN_CHUNK,
    cache_capacity,
    max_logits_rows,
)
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError
from llama_runtime.events import TokenEvent
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_lookup import PromptLookup
from llama_runtime.scheduler import Scheduler
from llama_runtime.sequence import Sequence
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step, StepBatch
from llama_runtime.token_counts import TokenCounts

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
VOCAB_SIZE, MAX_LEN, EOS = 256, 100, 0
ON = SamplingParams(max_tokens=30, speculation="on")
OFF = SamplingParams(max_tokens=30)
_ids = count()


class Scripted(PromptLookup):
    """Guesses what it is told, and remembers what it hears."""

    def __init__(self, drafts: Seq[int] = ()) -> None:
        super().__init__([])
        self.drafts = list(drafts)
        self.heard: list[tuple[int, int]] = []

    def draft(self, most: int) -> list[int]:
        return self.drafts[:most]

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        self.heard.append((num_drafted, num_accepted))


def sequence(
    num_tokens: int = 5,
    draft: Seq[int] | None = None,
    *,
    slot: int | None = None,
    max_tokens: int = 30,
) -> Sequence:
    """One that decodes; with a draft, it speculates."""
    return Sequence(
        id=next(_ids),
        token_ids=list(range(10, 10 + num_tokens)),
        num_prompt_tokens=num_tokens,
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        detokenizer=Detokenizer(TABLE),
        cache_len=num_tokens - 1,
        slot=slot,
        lookup=None if draft is None else Scripted(draft),
    )


# --- counts -------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 9), max_size=20),
    st.lists(st.integers(0, 9), max_size=20),
    st.lists(st.integers(0, 15), max_size=12),
)
def test_what_is_counted_and_taken_back_was_never_there(
    prompt: list[int], completion: list[int], guesses: list[int]
) -> None:
    counts, untouched = TokenCounts(prompt), TokenCounts(prompt)
    for token_id in completion:
        counts.add(token_id)
        untouched.add(token_id)
    for token_id in guesses:
        counts.add(token_id)
    for token_id in reversed(guesses):
        counts.remove(token_id)
    assert counts.token_ids.tolist() == untouched.token_ids.tolist()
    assert counts.in_completion.tolist() == untouched.in_completion.tolist()
    for token_id in (*guesses, 99):  # and it goes on as if nothing had been
        counts.add(token_id)
        untouched.add(token_id)
        assert counts.token_ids.tolist() == untouched.token_ids.tolist()
        assert counts.in_completion.tolist() == untouched.in_completion.tolist()


# --- arrays -------------------------------------------------------------------------------------


def test_a_step_that_verifies_is_written_out() -> None:
    guessing = Chunk(sequence(4, [70, 71], slot=3), 1, [70, 71])
    silent = Chunk(sequence(2, [], slot=1), 1)
    step = StepBatch(6, 150).build([guessing, silent])
    assert step.first_slot == 1
    assert step.input_ids.tolist() == [13, 70, 71, 11]
    assert step.unpack.tolist() == [[3, 0, 0], [0, 0, 0], [0, 1, 2]]
    assert step.pack.tolist() == [6, 7, 8, 0]
    assert step.seqlens_k.tolist() == [1, 0, 5]
    assert step.query_seqlens.tolist() == [1, 0, 3]
    assert step.total_sequence_length.tolist() == 6
    assert step.logits_rows.tolist() == [0, 1, 2, 3]
    assert step.num_logits == 4
    assert step.num_scored == 0


def test_rows_that_are_sampled_lie_in_order_of_chunks_and_of_guesses() -> None:
    drafts: list[list[int]] = [[70], [], [80, 81, 82]]
    chunks = [Chunk(sequence(5 + i, draft, slot=2 - i), 1, draft) for i, draft in enumerate(drafts)]
    step = StepBatch(3, 150).build(chunks)
    sampled = step.input_ids[step.logits_rows[: step.num_logits]]
    assert sampled.tolist() == [14, 70, 15, 16, 80, 81, 82]


def test_one_that_speculates_has_two_columns_even_if_nothing_is_guessed() -> None:
    batch = StepBatch(4, 150)
    step = batch.build([Chunk(sequence(3, [], slot=2), 1)])
    assert step.unpack.tolist() == [[0, 0]]
    assert step.pack[0] == 0
    assert (step.first_slot, step.query_seqlens.tolist()) == (2, [1])
    plain = batch.build([Chunk(sequence(3, slot=2), 1)])
    assert plain.unpack.shape == (4, 1)


def test_a_prompt_of_one_token_in_two_columns_counts_as_two_cached_ones() -> None:
    """ONNX Runtime refuses a step that has more columns than its longest sequence has tokens."""
    step = StepBatch(4, 150).build([Chunk(sequence(1, [], slot=2), 1)])
    assert step.unpack.shape == (1, 2)
    assert step.total_sequence_length.tolist() == 2
    assert step.seqlens_k.tolist() == [0]


@pytest.mark.parametrize("num_slots", [1, 8, 20, 200])
def test_the_fullest_step_that_verifies_fits_the_buffers(num_slots: int) -> None:
    """Though prompts may have fewer tokens."""
    draft = [1] * MAX_DRAFT
    scheduler = started([sequence(5, draft) for _ in range(num_slots)])
    chunks = scheduler.schedule()
    step = StepBatch(num_slots, MIN_CHUNK).build(chunks)
    num_rows = len(chunks) * (1 + MAX_DRAFT)
    assert step.num_logits == num_rows
    assert step.input_ids[:num_rows].tolist() == [14, *draft] * len(chunks)
    assert step.unpack.size <= MAX_CELLS


# --- turns --------------------------------------------------------------------------------------


def started(seqs: list[Sequence], **options: Any) -> Scheduler:
    """A scheduler in which they run already."""
    scheduler = Scheduler(
        SlotCache(len(seqs) + 1, max_len=2000),
        **{"prompt_budget": 1000, "max_chunk": 512, **options},
    )
    for seq in seqs:
        cache_len = seq.cache_len
        scheduler.start(seq, 0.0)
        seq.cache_len = cache_len
    return scheduler


def finish(chunks: list[Chunk]) -> None:
    """What the engine does with a step in which no guess is right."""
    for chunk in chunks:
        chunk.seq.cache_len += chunk.num_tokens - len(chunk.draft)
        if chunk.samples:
            chunk.seq.append(1)


def test_decoding_verifying_and_prompts_take_turns() -> None:
    plain, guessing, silent = sequence(), sequence(5, [7, 8]), sequence(5, [])
    prompt = sequence(400)
    prompt.cache_len = 0
    scheduler = started([plain, guessing, silent, prompt], prompt_budget=64, max_chunk=64)
    seen = []
    for _ in range(9):
        chunks = scheduler.schedule()
        seen.append({chunk.seq.id: (chunk.num_tokens, list(chunk.draft)) for chunk in chunks})
        finish(chunks)
    turn = [
        {prompt.id: (64, [])},
        {plain.id: (1, [])},
        {guessing.id: (3, [7, 8]), silent.id: (1, [])},
    ]
    assert seen == turn * 3


def test_where_nothing_decodes_those_that_speculate_run_in_every_step() -> None:
    scheduler = started([sequence(5, [7]), sequence(6, [])])
    for _ in range(4):
        chunks = scheduler.schedule()
        assert [chunk.num_sampled for chunk in chunks] == [2, 1]
        finish(chunks)


def test_a_prompt_that_speculates_runs_as_any_other() -> None:
    seq = sequence(30, [7, 8])
    seq.cache_len = 0
    (chunk,) = started([seq]).schedule()
    assert (chunk.num_tokens, list(chunk.draft), chunk.num_sampled) == (30, [], 1)


@pytest.mark.parametrize(("left", "guesses"), [(1, 0), (2, 1), (3, 2), (20, 8)])
def test_no_more_is_guessed_than_may_come(left: int, guesses: int) -> None:
    """With all guesses right, the row behind them gives the last token."""
    (chunk,) = started([sequence(5, [7] * 50, max_tokens=left)]).schedule()
    assert len(chunk.draft) == guesses <= MAX_DRAFT


@pytest.mark.parametrize("num_guesses", [0, 3, MAX_DRAFT])
@pytest.mark.parametrize("num_slots", [10, 60, 300, 1100])
def test_who_does_not_fit_comes_first_next_time(num_slots: int, num_guesses: int) -> None:
    """So nobody waits longer than it takes to serve all of them once, and guesses are whole."""
    seqs = [sequence(5, [7] * num_guesses) for _ in range(num_slots)]
    scheduler = started(seqs)
    order: list[int] = []
    num_steps = 0
    while len(order) < 3 * num_slots:
        chunks = scheduler.schedule()
        rows = sum(chunk.num_sampled for chunk in chunks)
        slots = [chunk.seq.slot or 0 for chunk in chunks]
        width = max(2, 1 + num_guesses)
        assert rows <= max_logits_rows(num_slots + 1)
        assert (max(slots) - min(slots) + 1) * width <= MAX_CELLS
        assert all(len(chunk.draft) == num_guesses for chunk in chunks)
        assert len({chunk.seq.id for chunk in chunks}) == len(chunks)
        order += [chunk.seq.id for chunk in chunks]
        num_steps += 1
        finish(chunks)
    for seq in seqs:  # everybody has had a turn, and none two more than another
        assert order[: 3 * num_slots].count(seq.id) in (2, 3, 4)
    if num_slots == 10:
        assert num_steps == 3


def test_the_rows_of_logits_bound_a_step() -> None:
    seqs = [sequence(5, [7] * n) for n in (3, 3, 3)]
    scheduler = started(seqs, max_logits=9)
    turns = []
    for _ in range(4):
        chunks = scheduler.schedule()
        turns.append([seqs.index(chunk.seq) for chunk in chunks])
        finish(chunks)
    assert turns == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_one_that_was_left_out_and_ends_is_forgotten() -> None:
    seqs = [sequence(5, [7] * 3) for _ in range(3)]
    scheduler = started(seqs, max_logits=9)
    finish(scheduler.schedule())
    scheduler.remove(seqs[2])
    assert [chunk.seq for chunk in scheduler.schedule()] == seqs[:2]


# --- tokens -------------------------------------------------------------------------------------


class Spelling:
    """A backend whose row at a place of the completion says that letter of a text.

    Attributes:
        broken: places whose row is no number.
        widths: how many columns each step had.
    """

    row_multiple = 1

    def __init__(self, text: str) -> None:
        self._token_ids = ids(text)
        self.broken: set[int] = set()
        self.widths: list[int] = []
        self.cleaned: list[tuple[int, int]] = []

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        self.widths.append(step.unpack.shape[1])
        logits = np.zeros((len(step.logits_rows), VOCAB_SIZE), np.float32)
        places = [
            chunk.seq.num_completion_tokens + ahead
            for chunk in step.chunks
            for ahead in range(chunk.num_sampled)
        ]
        for row, place in zip(logits, places, strict=True):
            row[self._token_ids[place % len(self._token_ids)]] = 50
            if place in self.broken:
                row.fill(np.nan)
        return logits

    def clean(self, slot: int, num_tokens: int) -> None:
        self.cleaned.append((slot, num_tokens))

    def close(self) -> None:
        pass


def ids(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


Guess = Callable[[Sequence], str]


def run(backend: Any, params: SamplingParams, guess: Guess) -> tuple[Sequence, list[Any], Engine]:
    """One sequence to its end: it, the events of each step, and the engine."""
    engine = slots_engine(
        backend,
        TABLE,
        [EOS],
        vocab_size=VOCAB_SIZE,
        max_batch=2,
        max_len=MAX_LEN,
        prompt_budget=MIN_CHUNK,
        max_chunk=MIN_CHUNK,
    )
    seq = engine.add([200, 201, 202], params)
    lookup = Scripted()
    seq.lookup = lookup
    steps = []
    while engine.has_work:
        lookup.drafts = ids(guess(seq))
        steps.append(engine.step())
        engine.check()
    assert engine.step() == []
    return seq, steps, engine


def texts(steps: list[list[TokenEvent]]) -> list[str]:
    return ["".join(event.text for event in events) for events in steps]


def test_a_step_gives_an_event_for_each_guess_that_was_right_and_one_more() -> None:
    guesses = {1: "bcX", 4: "XYZ", 5: "fgh"}
    seq, steps, engine = run(
        Spelling("abcdefghij"),
        SamplingParams(max_tokens=9, speculation="on"),
        lambda seq: guesses.get(seq.num_completion_tokens, ""),
    )
    assert texts(steps) == ["a", "bcd", "e", "fghi"]
    assert [[event.token_id for event in step] for step in steps[1:2]] == [ids("bcd")]
    assert seq.completion_token_ids == ids("abcdefghi")
    assert seq.finish_reason == "length"
    assert [event.finish_reason for step in steps for event in step] == [None] * 8 + ["length"]
    assert isinstance(seq.lookup, Scripted)
    assert seq.lookup.heard == [(3, 2), (3, 0), (3, 3)]
    counters = engine.counters()
    assert (counters.drafted_tokens, counters.accepted_tokens) == (9, 5)


@pytest.mark.parametrize(
    ("params", "text", "reason"),
    [
        ({"stop": "cd"}, "ab", "stop"),
        ({"stop": "cd", "include_stop": True}, "abcd", "stop"),
        ({"stop_token_ids": frozenset(ids("d"))}, "abc", "stop"),
        ({"max_tokens": 5}, "abcde", "length"),
    ],
)
def test_one_that_ends_among_right_guesses_has_no_event_afterwards(
    params: dict[str, Any], text: str, reason: str
) -> None:
    asked = SamplingParams(**{"max_tokens": 30, "speculation": "on", **params})
    seq, steps, engine = run(Spelling("abcdefghij"), asked, lambda _: "bcdefghi")
    events = [event for step in steps for event in step]
    assert "".join(event.text for event in events) == text
    assert [event.finish_reason for event in events][-1] == reason == seq.finish_reason
    assert all(event.finish_reason is None for event in events[:-1])
    assert len(events) == seq.num_completion_tokens == len(seq.completion_token_ids)
    assert len(steps) == 2
    counters = engine.counters()
    assert counters.accepted_tokens in (len(events) - 1, len(events) - 2)


def test_an_end_token_among_right_guesses_ends_it() -> None:
    text = "ab" + LETTERS[EOS] + "cdef"
    for params, expected in ((ON, text[:3]), (SamplingParams(max_tokens=4, min_tokens=3), None)):
        asked = SamplingParams(
            max_tokens=params.max_tokens, min_tokens=params.min_tokens, speculation="on"
        )
        seq, _, _ = run(Spelling(text), asked, lambda _: text[1:])
        if expected is None:  # out of reach before its time, in a row behind guesses too
            assert EOS not in seq.completion_token_ids[:3]
        else:
            assert seq.completion_token_ids == ids(expected)
            assert seq.finish_reason == "stop"


def test_a_broken_row_behind_a_wrong_guess_is_nobodys_fault() -> None:
    backend = Spelling("abcdefghij")
    backend.broken = {3}
    seq, steps, engine = run(
        backend,
        SamplingParams(max_tokens=3, speculation="on"),
        lambda _: "bX" if len(backend.widths) < 2 else "",
    )
    assert texts(steps) == ["a", "bc"]
    assert seq.finish_reason == "length"
    assert backend.cleaned == []
    assert engine.failure is None


@pytest.mark.parametrize(("broken", "told"), [(1, "a"), (2, "ab"), (3, "abc")])
def test_a_broken_row_that_counts_is_the_sequences_fault(broken: int, told: str) -> None:
    backend = Spelling("abcdefghij")
    backend.broken = {broken}
    seq, steps, engine = run(backend, ON, lambda _: "bcdefghi"[seq_len(backend) :])
    events = [event for step in steps for event in step]
    assert "".join(event.text for event in events) == told
    assert (events[-1].token_id, events[-1].finish_reason) == (None, "error")
    assert isinstance(events[-1].error, BackendError)
    assert seq.finish_reason == "error"
    assert engine.failure is None
    # Nobody reads what the guesses wrote either.
    (cleaned,) = backend.cleaned
    assert cleaned[1] >= seq.num_tokens + MAX_DRAFT


def seq_len(backend: Spelling) -> int:
    """Where the guess of the next step begins: the first is made after one token."""
    return max(0, len(backend.widths) - 1)


def test_a_sequence_that_is_given_up_between_steps_leaves_its_slot() -> None:
    engine = slots_engine(
        Fake(1, cache_capacity(MAX_LEN, MIN_CHUNK), VOCAB_SIZE),
        TABLE,
        [],
        vocab_size=VOCAB_SIZE,
        max_batch=1,
        max_len=MAX_LEN,
        prompt_budget=MIN_CHUNK,
        max_chunk=MIN_CHUNK,
    )
    first = engine.add([1] * 8, ON)
    first.lookup = Scripted([1] * 8)
    second = engine.add([2], OFF)
    for _ in range(3):
        engine.step()
    engine.abort(first.id)
    while engine.has_work:
        engine.step()
        engine.check()
    assert (first.finish_reason, second.finish_reason) == ("abort", "length")


def test_steps_of_plain_sequences_stay_in_one_column_beside_one_that_speculates() -> None:
    backend: Any = Spelling("abcdefghij")
    engine = slots_engine(
        backend,
        TABLE,
        [],
        vocab_size=VOCAB_SIZE,
        max_batch=2,
        max_len=MAX_LEN,
        prompt_budget=MIN_CHUNK,
        max_chunk=MIN_CHUNK,
    )
    engine.add([200, 201], OFF)
    guessing = engine.add([200, 201], ON)
    guessing.lookup = Scripted([])
    while engine.has_work:
        engine.step()
    assert set(backend.widths) == {1, 2}
    assert abs(backend.widths.count(1) - backend.widths.count(2)) <= 1


def test_the_limits_of_a_step_are_those_of_the_contract() -> None:
    assert 1 + MAX_DRAFT <= MAX_VERIFIED <= MAX_CELLS
