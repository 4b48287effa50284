"""Counts of tokens against ``collections.Counter``."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.token_counts import TokenCounts

token_ids = st.integers(0, 9) | st.integers(0, 200_000)


def as_counter(counts: TokenCounts) -> Counter[int]:
    return Counter(dict(zip(counts.token_ids.tolist(), counts.in_completion.tolist(), strict=True)))


@given(st.lists(token_ids, max_size=60), st.lists(token_ids, max_size=60))
def test_they_are_those_of_a_counter_after_every_token(
    prompt: list[int], completion: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for i in range(len(completion) + 1):
        assert counts.token_ids.tolist() == list(dict.fromkeys(prompt + completion[:i]))
        assert as_counter(counts) == Counter(completion[:i])
        if i < len(completion):
            counts.add(completion[i])


def test_they_grow_far_past_the_room_they_begin_with() -> None:
    counts = TokenCounts([7])
    for token_id in [*range(5000), *range(2500)]:
        counts.add(token_id)
    assert as_counter(counts) == Counter([*range(5000), *range(2500)])
    assert counts.token_ids.tolist() == [7, *(i for i in range(5000) if i != 7)]


@pytest.mark.alone
def test_one_more_costs_the_same_after_a_long_prompt() -> None:
    def seconds(length: int) -> float:
        counts = TokenCounts(range(length))
        started = time.perf_counter()
        for token_id in range(2000):
            counts.add(token_id)
        return time.perf_counter() - started

    seconds(10)
    assert min(seconds(100_000) for _ in range(3)) < 10 * min(seconds(3000) for _ in range(3))
