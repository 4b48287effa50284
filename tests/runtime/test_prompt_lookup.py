"""What is guessed followed an earlier occurrence, and guesses are as long as they deserve."""

from __future__ import annotations

import random
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.contract import MAX_DRAFT
from llama_runtime.prompt_lookup import (
    FEWEST,
    FIRST_LENGTH,
    LONGEST,
    LONGEST_PAUSE,
    PATIENCE,
    PLACES,
    PromptLookup,
)

texts = st.lists(st.integers(0, 3), max_size=60)
most_of = st.integers(0, MAX_DRAFT)
verdicts = st.lists(st.tuples(st.integers(1, MAX_DRAFT), st.floats(0, 1)), max_size=12)


def followed(tokens: list[int], most: int) -> list[int]:
    """The guess by looking at every place: longest match first, of those the latest."""
    found, longest = None, 0
    candidates = [
        place
        for place in range(len(tokens) - 1, FEWEST - 1, -1)
        if tokens[place - FEWEST : place] == tokens[len(tokens) - FEWEST :]
    ]
    for place in candidates[:PLACES]:
        alike = FEWEST
        while alike < LONGEST and alike < place and tokens[place - alike - 1] == tokens[-alike - 1]:
            alike += 1
        if alike > longest:
            found, longest = place, alike
    if found is None:
        return []
    copied = list(tokens)
    for i in range(most):
        copied.append(copied[found + i])  # past the old end it reads what it wrote
    return copied[len(tokens) :]


def play(lookup: PromptLookup, truth: list[int], at: int) -> tuple[int, int, list[int]]:
    """Let the text go on as it does from a place on: guesses, those that were right, lengths."""
    drafted = accepted = 0
    lengths = []
    while at < len(truth):
        draft = lookup.draft(min(MAX_DRAFT, len(truth) - at - 1))
        right = 0
        for token_id in draft:
            if token_id != truth[at + right]:
                break
            right += 1
        for token_id in truth[at : at + right + 1]:
            lookup.add(token_id)
        at += right + 1
        if draft:
            lookup.learn(len(draft), right)
        lengths.append(len(draft))
        drafted, accepted = drafted + len(draft), accepted + right
    return drafted, accepted, lengths


# --- what is guessed ----------------------------------------------------------------------------


@given(texts, most_of)
def test_a_guess_is_what_followed_the_longest_and_then_the_latest_match(
    tokens: list[int], most: int
) -> None:
    expected = followed(tokens, min(most, FIRST_LENGTH))
    assert PromptLookup(tokens).draft(most) == expected


def test_the_latest_of_equal_matches_is_taken_and_a_longer_one_before_it() -> None:
    assert PromptLookup([1, 2, 30, 9, 1, 2, 40, 8, 1, 2]).draft(1) == [40]
    assert PromptLookup([7, 1, 2, 30, 9, 1, 2, 40, 7, 1, 2]).draft(1) == [30]


@given(texts, texts, most_of)
def test_tokens_of_the_prompt_and_of_the_completion_count_alike(
    prompt: list[int], completion: list[int], most: int
) -> None:
    grown = PromptLookup(prompt)
    for token_id in completion:
        grown.add(token_id)
    assert grown.draft(most) == PromptLookup(prompt + completion).draft(most)


@given(texts, most_of, verdicts)
def test_asking_changes_nothing(
    tokens: list[int], most: int, told: list[tuple[int, float]]
) -> None:
    asked, other = PromptLookup(tokens[:30]), PromptLookup(tokens[:30])
    for lookup in (asked, other):
        for num_drafted, part in told:
            lookup.learn(num_drafted, round(part * num_drafted))
    for token_id in [*tokens[30:], 0]:
        for count in (most, MAX_DRAFT, 0):
            asked.draft(count)
        assert asked.draft(most) == asked.draft(most) == other.draft(most)
        for lookup in (asked, other):
            lookup.add(token_id)


@given(texts, most_of, verdicts)
def test_a_guess_is_never_longer_than_it_may_be(
    tokens: list[int], most: int, told: list[tuple[int, float]]
) -> None:
    lookup = PromptLookup(tokens)
    for num_drafted, part in told:
        lookup.learn(num_drafted, round(part * num_drafted))
        assert len(lookup.draft(most)) <= most
        assert len(lookup.draft(100)) <= MAX_DRAFT
        # A shorter one is the beginning of a longer one.
        assert lookup.draft(100)[:most] == lookup.draft(most)


@pytest.mark.parametrize("tokens", [[], [5], [5, 6], [5, 6, 7], [5, 5]])
def test_a_text_too_short_to_repeat_itself_is_no_guess(tokens: list[int]) -> None:
    assert PromptLookup(tokens).draft(MAX_DRAFT) == []


# --- how long guesses are -----------------------------------------------------------------------


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_a_text_that_repeats_itself_gets_full_guesses_that_are_right(period: int) -> None:
    text = [100 + i % period for i in range(300)]
    drafted, accepted, lengths = play(PromptLookup(text[:20]), text, 20)
    assert drafted == accepted
    assert lengths[:3] == [FIRST_LENGTH, MAX_DRAFT, MAX_DRAFT]
    assert set(lengths[3:-1]) == {MAX_DRAFT}


def test_a_copy_with_changes_has_most_of_its_tokens_guessed() -> None:
    choose = random.Random(0)
    prompt = choose.choices(range(5000), k=300)
    copy = [choose.randrange(5000) if i % 20 == 19 else token for i, token in enumerate(prompt)]
    drafted, accepted, lengths = play(PromptLookup(prompt), prompt + copy, 300)
    assert accepted > 0.6 * len(copy)
    assert accepted > 0.6 * drafted
    assert len(lengths) < 0.4 * len(copy)  # steps


def test_the_length_follows_what_was_right() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2])

    def length_after(num_drafted: int, num_accepted: int) -> int:
        lookup.learn(num_drafted, num_accepted)
        return len(lookup.draft(100))

    assert len(lookup.draft(100)) == FIRST_LENGTH == 4
    assert length_after(4, 4) == 8
    assert length_after(8, 8) == 8 == MAX_DRAFT
    assert length_after(8, 2) == 3
    assert length_after(3, 3) == 6
    assert length_after(1, 1) == 6  # for lack of room: says nothing about longer ones
    assert length_after(6, 0) == 3
    assert length_after(3, 1) == 2


def test_it_pauses_for_longer_and_longer_while_nothing_is_right() -> None:
    text = [1, 2] * 200  # there is a guess at every place
    lookup = PromptLookup(text[:20])
    pauses, pause = [], 0
    for token_id in text:
        if lookup.draft(MAX_DRAFT):
            pauses.append(pause)
            pause = 0
            lookup.add(token_id)
            lookup.learn(1, 0)
        else:
            pause += 1
            lookup.add(token_id)
    assert pauses[: PATIENCE + 6] == [0] * PATIENCE + [1, 2, 4, 8, 16, 32]
    assert set(pauses[PATIENCE + 6 :]) == {LONGEST_PAUSE}


def test_one_that_is_right_ends_the_pauses() -> None:
    lookup = PromptLookup([1, 2] * 10)
    for _ in range(5):
        lookup.learn(1, 0)
    assert lookup.draft(MAX_DRAFT) == []
    for i in range(LONGEST_PAUSE):
        lookup.add(1 + i % 2)
    assert len(lookup.draft(MAX_DRAFT)) == 1
    lookup.learn(1, 1)
    assert len(lookup.draft(MAX_DRAFT)) == 2
    lookup.learn(2, 0)
    assert len(lookup.draft(MAX_DRAFT)) == 1  # patience is new


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [2, 10, 300, 40_000])
def test_where_nothing_can_be_foretold_few_tokens_are_guessed_in_vain(vocab_size: int) -> None:
    """A wrong one costs a quarter of a step in a batch of eight, so one in ten costs 3 %."""
    choose = random.Random(0)
    text = choose.choices(range(vocab_size), k=2000)
    drafted, accepted, _ = play(PromptLookup(text[:200]), text, 200)
    if vocab_size > 2:  # a coin is foretold by half of all guesses
        assert drafted - accepted < 0.1 * 1800
    else:
        assert accepted > 0.3 * drafted


def test_a_text_that_leads_astray_costs_little() -> None:
    """Every pair was seen before, and never goes on as it did."""
    text = [token for i in range(700) for token in (1, 2, 10 + i)]
    lookup, drafted = PromptLookup(text[:60]), 0
    for token_id in text[60:]:
        draft = lookup.draft(MAX_DRAFT)
        lookup.add(token_id)
        if draft:
            drafted += len(draft)
            lookup.learn(len(draft), 0)
    assert 0 < drafted < 0.05 * len(text)


@pytest.mark.alone
def test_one_more_token_costs_the_same_after_a_long_text() -> None:
    def seconds(length: int) -> float:
        lookup = PromptLookup([i % 7 for i in range(length)])
        started = time.perf_counter()
        for i in range(length, length + 1000):
            lookup.add(i % 7)
            lookup.draft(MAX_DRAFT)
        return time.perf_counter() - started

    seconds(10)
    assert min(seconds(100_000) for _ in range(3)) < 10 * min(seconds(2000) for _ in range(3))


def test_a_token_takes_little_memory() -> None:
    tokens = random.Random(0).choices(range(50_000), k=20_000)
    tracemalloc.start()
    try:
        lookup = PromptLookup(tokens)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lookup.draft(0) == []
    assert held < 300 * len(tokens)
