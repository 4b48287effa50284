"""Parts of the server alone, where a whole one would show too little."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_runtime.admission import Accepted, Deliver, Ticket
from llama_runtime.async_request import AsyncRequest, Deadline
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import BackendError, RequestError
from llama_runtime.events import TokenEvent
from llama_runtime.openai_api import parse_completion
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.server import ServerSettings
from llama_runtime.server.connection import while_connected
from llama_runtime.server.failures import ClientGoneError
from llama_runtime.server.generation import Generation, Progress
from llama_runtime.server.keys import is_loopback
from llama_runtime.server.metrics import Tally
from llama_runtime.server.page_activity import Activity, Call
from llama_runtime.server.request_log import RequestRecord


def receiving(gone: asyncio.Event) -> Any:
    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def work(gone: asyncio.Event, done: list[str]) -> None:
    async with while_connected(receiving(gone)):
        done.append("begun")
        await asyncio.sleep(20)


def test_who_hangs_up_is_told_from_who_is_cancelled() -> None:
    async def main() -> None:
        done: list[str] = []
        gone = asyncio.Event()
        task = asyncio.create_task(work(gone, done))
        await asyncio.sleep(0)
        gone.set()
        with pytest.raises(ClientGoneError):
            await task
        task = asyncio.create_task(work(asyncio.Event(), done))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with while_connected(receiving(asyncio.Event())):
            done.append("ended")
        assert done == ["begun", "begun", "ended"]
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "no watcher is left"

    asyncio.run(main())


class Silent:
    """A worker that says no more of a request than that it is accepted, if that.

    Args:
        accepts: whether it says so much.
    """

    forked = False

    def __init__(self, *, accepts: bool) -> None:
        self.cancelled: list[Ticket] = []
        self._accepts = accepts

    def admit(self, deliver: Deliver, _within: None, *, streamed: bool) -> Ticket:
        return Ticket(deliver, streamed=streamed)

    def submit(self, ticket: Ticket, _token_ids: list[int], _params: SamplingParams) -> None:
        if self._accepts:
            seq: Any = SimpleNamespace(id=1, prompt_logprobs=[])
            assert ticket.tell(Accepted((seq,)))

    def cancel(self, ticket: Ticket) -> None:
        self.cancelled.append(ticket)


def generation_on(worker: Any, bundle: Path, call: Call) -> Generation:
    def request(prompt: list[int], params: SamplingParams, **_: object) -> AsyncRequest:
        return AsyncRequest(worker, prompt, params)

    llm: Any = SimpleNamespace(max_batch=2, request=request)
    asked = parse_completion({"model": "m", "prompt": "a"}, SamplingParams())
    prepared = asked.prepared(PromptEncoder(open_bundle(bundle)))
    return Generation(llm, prepared, Deadline(None), call, Tally())


@pytest.fixture
def call() -> Call:
    return Activity().enter(RequestRecord(id="name", method="POST", path="/"))


def test_what_came_before_an_error_is_given_out_before_it(fake_bundle: Path, call: Call) -> None:
    async def main() -> None:
        generation = generation_on(Silent(accepts=True), fake_bundle, call)
        await generation.start(None, lambda: None)
        event = TokenEvent(1, 5, "a")
        for message in (event, BackendError("the graph failed"), event):
            generation._mailbox.post(0, message)
        assert await generation.some() == [Progress(0, event, [])]
        for _ in range(2):
            with pytest.raises(BackendError):
                await generation.some()

    asyncio.run(main())


def test_who_leaves_before_the_engine_says_a_word_gives_the_place_back(
    fake_bundle: Path, call: Call
) -> None:
    """At once, and not when the garbage is collected."""

    async def main() -> None:
        worker = Silent(accepts=False)
        generation = generation_on(worker, fake_bundle, call)
        task = asyncio.create_task(generation.start(None, lambda: None))
        await asyncio.sleep(0)
        assert len(call.requests) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(worker.cancelled) == 1
        assert not call.requests

    asyncio.run(main())


def test_a_name_with_one_address_that_others_reach_is_no_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found(*_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET, 1, 6, "", (host, 0)) for host in ("127.0.0.1", "192.0.2.1")]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    assert not is_loopback("both")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_names", ("",)),
        ("model_names", ("x" * 257,)),
        ("api_keys", ("",)),
        ("api_keys", ("a b",)),
        ("api_keys", ("é",)),
        ("request_timeout", 0),
        ("request_timeout", float("nan")),
        ("max_queue_time", -1),
        ("max_queue_time", True),
        ("body_timeout", None),
        ("ping_seconds", "1"),
        ("max_body_bytes", 0),
        ("max_header_bytes", 1.5),
        ("max_prompt_bytes", 0),
        ("text_threads", 10**6),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        ServerSettings(**{name: value})
    assert refusal.value.param == name
    assert "é" not in str(refusal.value)


def test_the_most_bytes_of_a_prompt_follow_from_the_context() -> None:
    assert ServerSettings().prompt_bytes(512) == 65_536
    assert ServerSettings().prompt_bytes(131_072) == 8 * 131_072
    assert ServerSettings(max_prompt_bytes=100).prompt_bytes(131_072) == 100
