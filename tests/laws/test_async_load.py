"""A slice of scripts/prove_async_load: a service's memory doesn't grow, whatever its clients do."""

from __future__ import annotations

import sys

import pytest

from scripts.soak_async import fake_llm, soak

pytestmark = [
    pytest.mark.alone,  # what is in memory depends on who waits for whom
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def test_memory_does_not_grow_with_requests_however_they_end() -> None:
    with fake_llm() as llm:
        found = soak(llm, requests=5000, seed=7, say=print)
        llm._worker._engine.check()
        assert llm.health() == "ok"
    assert found.requests >= 5000
    assert min(found.refused, found.given_up) > 100
    assert found.steady, found
