"""The rules that keep a sequence's bits the same in any company, as the schedule obeys them.

docs/architecture.md says what each is for. ``test_company`` shows that together they suffice; here
each has a test of its own that fails without it.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from llama_runtime.backends.fake import Fake
from llama_runtime.chunk import next_chunk
from llama_runtime.contract import (
    MAX_CHUNK,
    MAX_DRAFT,
    MIN_CHUNK,
    cache_capacity,
    last_chunk_start,
)
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.params import SamplingParams
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step

BYTE_LEVEL = Tokenizer(models.BPE({"a": 0}, []))
BYTE_LEVEL.decoder = decoders.ByteLevel()
TABLE = TokenBytes(BYTE_LEVEL)
VOCAB_SIZE = 64
EVERY_LENGTH = range(1, 701)


class Recorded(Fake):
    """Keeps a copy of every step."""

    def __init__(self, num_slots: int, capacity: int) -> None:
        super().__init__(num_slots, capacity, VOCAB_SIZE)
        self.num_slots = num_slots
        self.capacity = capacity
        self.steps: list[dict[str, Any]] = []

    def run(self, step: Step) -> npt.NDArray[np.float32]:
        arrays = {name: np.copy(getattr(step, name)) for name in Step.__slots__ if name != "chunks"}
        chunks = [(chunk.seq.slot, chunk.num_tokens) for chunk in step.chunks]
        self.steps.append({**arrays, "chunks": chunks})
        return super().run(step)


def random_schedule(seed: int) -> Recorded:
    """A run of many requests that come and go, to its end."""
    choose = random.Random(seed)
    num_slots, max_len = choose.randint(1, 9), choose.choice([34, 100, 400])
    max_chunk = choose.randint(MIN_CHUNK, 200)
    backend = Recorded(num_slots, cache_capacity(max_len, max_chunk))
    engine = slots_engine(
        backend,
        TABLE,
        {2},
        vocab_size=VOCAB_SIZE,
        max_batch=num_slots,
        max_len=max_len,
        prompt_budget=choose.randint(MIN_CHUNK, 200),
        max_chunk=max_chunk,
        refill=choose.random() < 0.8,
    )
    waiting = choose.randint(1, 20)
    seqs = []
    while waiting or engine.has_work:
        if waiting and choose.random() < 0.4:
            waiting -= 1
            # To the very end of the cache, often.
            max_tokens = choose.choice([1, 2, 5, max_len - 1])
            longest = max_len - max_tokens
            num_prompt_tokens = choose.choice([1, longest, choose.randint(1, longest)])
            prompt = [choose.randrange(VOCAB_SIZE) for _ in range(num_prompt_tokens)]
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=choose.random() < 0.5)
            seqs.append(engine.add(prompt, params))
        if seqs and choose.random() < 0.05:
            engine.abort(choose.choice(seqs).id)
        engine.step()
    return backend


@pytest.fixture(scope="module")
def schedules() -> list[Recorded]:
    return [random_schedule(seed) for seed in range(40)]


# --- 1: one column or many ----------------------------------------------------------------------


def test_sequences_that_decode_never_share_a_step_with_prompts(schedules: list[Recorded]) -> None:
    decoding = prompts = 0
    for backend in schedules:
        for step in backend.steps:
            counts = {count for _, count in step["chunks"]}
            assert counts == {1} or 1 not in counts
            assert step["unpack"].shape[1] == max(counts)
            decoding += counts == {1}
            prompts += counts != {1}
    assert min(decoding, prompts) > 100


# --- 2: the borders of chunks -------------------------------------------------------------------


def chunks_of(num_prompt_tokens: int, limits: list[int]) -> list[tuple[int, int]]:
    """Start and end of each chunk of a prompt, the limits of the steps taken in turn."""
    borders, start, steps = [], 0, 0
    while start < num_prompt_tokens:
        count = next_chunk(start, num_prompt_tokens, limits[steps % len(limits)])
        steps += 1
        assert steps < 2 * num_prompt_tokens + 2
        if count:
            borders.append((start, start + count))
            start += count
    return borders


@pytest.mark.parametrize("num_prompt_tokens", EVERY_LENGTH[::50])
def test_the_last_chunk_starts_where_the_rule_says(num_prompt_tokens: int) -> None:
    assert last_chunk_start(num_prompt_tokens) == 32 * max(0, (num_prompt_tokens - 2) // 32)


def test_the_last_chunk_has_2_to_33_tokens_and_1_only_for_a_prompt_of_1() -> None:
    sizes = {n: n - last_chunk_start(n) for n in EVERY_LENGTH}
    assert sizes.pop(1) == 1
    assert set(sizes.values()) == set(range(2, MIN_CHUNK + 1))


@given(st.lists(st.integers(MIN_CHUNK, MAX_CHUNK), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_prompts_of_every_length_are_cut_at_multiples_of_32_and_end_in_one_piece(
    limits: list[int],
) -> None:
    for num_prompt_tokens in EVERY_LENGTH:
        *earlier, last = chunks_of(num_prompt_tokens, limits)
        assert last == (32 * max(0, (num_prompt_tokens - 2) // 32), num_prompt_tokens)
        assert all(end % 32 == 0 for _, end in earlier)
        assert len(earlier) <= num_prompt_tokens // 32


@given(st.lists(st.integers(0, MIN_CHUNK), min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_a_step_with_too_little_room_takes_nothing_rather_than_break_the_rule(
    limits: list[int],
) -> None:
    for num_prompt_tokens in EVERY_LENGTH[::7]:
        *earlier, last = chunks_of(num_prompt_tokens, [*limits, MIN_CHUNK])
        assert last == (last_chunk_start(num_prompt_tokens), num_prompt_tokens)
        assert all(end % 32 == 0 for _, end in earlier)


def test_no_chunk_is_longer_than_its_limit() -> None:
    for limit in range(MIN_CHUNK, 100):
        for num_prompt_tokens in EVERY_LENGTH:
            for start in range(0, last_chunk_start(num_prompt_tokens) + 1, 32):
                assert 1 <= next_chunk(start, num_prompt_tokens, limit) <= limit


# --- 3: padded rows -----------------------------------------------------------------------------


def test_packed_and_sampled_rows_are_padded_to_multiples_of_four(schedules: list[Recorded]) -> None:
    for backend in schedules:
        for step in backend.steps:
            num_tokens = sum(count for _, count in step["chunks"])
            assert len(step["input_ids"]) == len(step["pack"]) == -(-num_tokens // 4) * 4
            assert len(step["logits_rows"]) == -(-step["num_logits"] // 4) * 4


def test_dummy_rows_write_no_cache(schedules: list[Recorded]) -> None:
    # What is written is what a cell below query_seqlens reads.
    for backend in schedules:
        for step in backend.steps:
            num_tokens = sum(count for _, count in step["chunks"])
            written = [
                row
                for cells, count in zip(step["unpack"], step["query_seqlens"], strict=True)
                for row in cells[:count]
            ]
            assert sorted(written) == list(range(num_tokens))
            assert (step["logits_rows"][: step["num_logits"]] < num_tokens).all()


def test_dummy_rows_and_cells_read_rows_and_cells_that_exist(schedules: list[Recorded]) -> None:
    for backend in schedules:
        for step in backend.steps:
            assert 0 <= step["input_ids"].min() <= step["input_ids"].max() < VOCAB_SIZE
            for indices, size in (
                (step["unpack"], len(step["input_ids"])),
                (step["pack"], step["unpack"].size),
                (step["logits_rows"], len(step["input_ids"])),
            ):
                assert indices.min(initial=0) >= 0
                assert indices.max(initial=0) < size


# --- 4: idle slots and the end of the cache -----------------------------------------------------


def test_inactive_slots_pass_zeros(schedules: list[Recorded]) -> None:
    inactive = 0
    for backend in schedules:
        for step in backend.steps:
            counts = dict(step["chunks"])
            for i, count in enumerate(step["query_seqlens"]):
                assert count == counts.pop(step["first_slot"] + i, 0)
                if count == 0:
                    assert step["seqlens_k"][i] == 0
                    inactive += 1
            assert not counts
    assert inactive > 100


def test_every_padded_chunk_lies_in_the_cache(schedules: list[Recorded]) -> None:
    slack = []
    for backend in schedules:
        for step in backend.steps:
            width = step["unpack"].shape[1]
            active = step["query_seqlens"] > 0
            past = step["seqlens_k"] + 1 - step["query_seqlens"]
            ends = past[active] + width
            assert ends.max() <= backend.capacity
            slack.append(backend.capacity - ends.max())
    assert min(slack) <= MAX_DRAFT  # the schedules do go to the end


@given(max_len=st.integers(2, 4096), max_chunk=st.integers(MIN_CHUNK, MAX_CHUNK))
def test_the_capacity_is_enough_for_any_past_and_width_and_no_more_than_a_chunk_over(
    max_len: int, max_chunk: int
) -> None:
    longest_past = max(last_chunk_start(n) for n in range(1, max_len))
    widest = min(max_chunk, max_len - 1)
    capacity = cache_capacity(max_len, max_chunk)
    verified = max_len - 2 + 1 + MAX_DRAFT  # the last token that is decoded, and guesses
    assert max(verified, longest_past + widest) == capacity <= max_len + max_chunk
    assert 1 + widest <= capacity  # an idle slot counts as one that holds a token


def test_no_step_is_empty(schedules: list[Recorded]) -> None:
    assert all(step["chunks"] for backend in schedules for step in backend.steps)
