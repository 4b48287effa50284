"""What is drawn ahead comes in order, up to its end, and never more than a few items early."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from llama_runtime.batch.runners.prefetch import Prefetch


def test_items_come_in_order_and_then_what_the_iterator_raised() -> None:
    def items(error: Exception | None) -> Iterator[int]:
        yield from range(100)
        if error is not None:
            raise error

    for error, expected in ((None, StopIteration), (KeyError("broken"), KeyError)):
        ahead = Prefetch(items(error), 3)
        assert [ahead.take(wait=True) for _ in range(100)] == list(range(100))
        for wait in (True, False):  # the first time, the end may not be known yet
            with pytest.raises(expected):
                ahead.take(wait=wait)


def test_no_more_are_drawn_than_may_wait() -> None:
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        while drawn < 1000:
            drawn += 1
            yield drawn

    ahead = Prefetch(items(), 3)
    for taken in range(1, 50):
        assert ahead.take(wait=True) == taken
        time.sleep(0.001)
        assert drawn <= taken + 3 + 1
    ahead.close()
    time.sleep(0.3)
    assert drawn <= 49 + 3 + 1


def test_an_item_that_is_late_is_waited_for_only_if_asked() -> None:
    released = threading.Event()

    def items() -> Iterator[str]:
        released.wait(10)
        yield "late"

    ahead = Prefetch(items(), 1)
    assert ahead.take(wait=False) is None
    threading.Timer(0.05, released.set).start()
    assert ahead.take(wait=True) == "late"
    with pytest.raises(StopIteration):
        ahead.take(wait=True)
