"""What is served is what ``LLM.generate`` makes: texts, tokens, their log-probabilities, ends.

Two hundred requests of every kind ask at once over HTTP, in the company that comes about; the
facade has them in another order and with fewer slots. On fp32 both must be the same to the last
bit, streamed or whole. ``scripts/prove_conformance --part tokens`` asks a real model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.llm import LLM
from llama_runtime.server import ServerSettings, Service
from scripts.conformance_requests import Asked, expected, requests, served
from tests.runtime.server.serving import Serving, listening

COUNT, AT_ONCE = 200, 40


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    return requests(COUNT, seed=3, longest=40, most=10)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Serving]:
    llm = AsyncLLM(tiny_bundle, max_batch=12, max_len=128, threads=1)
    service = Service(ServerSettings(), llm)
    with listening(service) as port:
        yield Serving(port, service, llm, None)  # type: ignore[arg-type]
    asyncio.run(llm.close())


def test_what_is_served_is_what_the_facade_makes(
    server: Serving, asked: list[Asked], tiny_bundle: Path
) -> None:
    (name,) = server.service.names

    def ask(one: Asked) -> object:
        answer = server.post(one.path, one.body | {"model": name})
        assert answer.status == 200, answer.body
        return served(one, answer.body)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        given = list(pool.map(ask, asked))
    with LLM(tiny_bundle, max_batch=5, max_len=128, threads=1) as llm:
        made = expected(llm, asked)
    for one, found, wanted in zip(asked, given, made, strict=True):
        assert found == wanted, one


def test_requests_of_every_kind_are_among_them(asked: list[Asked]) -> None:
    kinds = {(one.path, bool(one.body.get("stream")), "seed" in one.body) for one in asked}
    assert len(kinds) == 8
    for name in ("n", "stop", "logprobs", "top_k", "min_p", "presence_penalty", "logit_bias"):
        assert sum(name in one.body for one in asked) > 5, name
