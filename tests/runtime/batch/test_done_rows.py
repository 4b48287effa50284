"""A set of rows in bits is a set."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.batch.results.done_rows import DoneRows


@given(st.lists(st.integers(0, 300), unique=True), st.booleans())
def test_it_holds_what_was_added_and_knows_the_first_that_is_missing(
    added: list[int], from_the_start: bool
) -> None:
    rows, expected = DoneRows(), set(added)
    if from_the_start:
        expected |= set(range(len(added) % 40))
    for index in sorted(expected, key=lambda index: index * 7919 % 301):
        rows.add(index)
    assert len(rows) == len(expected)
    assert {index for index in range(400) if index in rows} == expected
    assert rows.first_missing() == next(index for index in range(400) if index not in expected)
    for index in expected:
        with pytest.raises(ValueError, match=f"row {index} is done already"):
            rows.add(index)
    assert len(rows) == len(expected)
