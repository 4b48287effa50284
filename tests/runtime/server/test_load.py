"""Too many, too slow, gone: nobody waits in vain, and nothing stays behind."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx2
import openai
import pytest

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.openai_api.requests import ApiRequest
from llama_runtime.server import ServerSettings, create_app
from tests.runtime.server.serving import (
    COMPLETIONS,
    MODEL,
    WORK,
    Answer,
    Serving,
    events_of,
    read_answer,
    serving,
    stream_bytes,
    watched_models,
)
from tests.watched_backend import wait_for


def ask(server: Serving, **more: object) -> Answer:
    return server.post(COMPLETIONS, {"model": MODEL, "prompt": "Hello", **more})


def test_one_too_many_is_told_when_to_ask_again(roomy: Path) -> None:
    with serving(roomy, max_batch=1, max_queued_requests=2) as server:
        server.backend.hang_after(0)
        with server.connect() as running, server.connect() as waiting:
            running.sendall(stream_bytes(3))
            server.backend.wait_until_it_hangs()
            waiting.sendall(stream_bytes(3))
            wait_for(lambda: server.llm.stats().waiting == 2)
            for path, body in WORK:
                refused = server.post(path, body)
                assert refused.status == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.error["code"] == "rate_limit_exceeded"
            assert server.get("/ready").status == 200
            with server.client(retries=5) as client, ThreadPoolExecutor(1) as pool:
                patient = pool.submit(
                    lambda: client.completions.create(model=MODEL, prompt="a", max_tokens=1)
                )
                server.backend.go_on()
                assert patient.result().choices[0].finish_reason == "length"
            for connection in (running, waiting):
                assert events_of(read_answer(connection).body)[-1] == "[DONE]"
        server.wait_until_idle()


def test_each_request_counts_once_while_a_step_hangs(roomy: Path) -> None:
    """And not where it came in and where it waits: as many wait as may."""
    with serving(roomy, max_batch=1, max_queued_requests=6) as server, ExitStack() as stack:
        server.backend.hang_after(0)
        first = stack.enter_context(server.connect())
        first.sendall(stream_bytes(3))
        server.backend.wait_until_it_hangs()
        for count in range(2, 7):
            stack.enter_context(server.connect()).sendall(stream_bytes(3))
            wait_for(lambda count=count: server.llm.stats().waiting == count)  # type: ignore[misc]
        assert ask(server).status == 429
        server.backend.go_on()
        assert events_of(read_answer(first).body)[-1] == "[DONE]"


def test_prompts_are_counted_before_they_are_tokens(
    roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that will be refused costs no tokenising, and those that are at it count."""
    begun, goes_on = threading.Semaphore(0), threading.Event()
    prepared = ApiRequest.prepared

    def slow(self: ApiRequest, *args: object, **more: object) -> object:
        begun.release()
        goes_on.wait()
        return prepared(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(ApiRequest, "prepared", slow)
    with (
        serving(roomy, max_len=2048, max_queued_tokens=300) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        long = pool.submit(ask, server, prompt="x" * 1200, max_tokens=1)
        begun.acquire()
        refused = ask(server)
        assert refused.status == 429
        assert "300" in refused.error["message"]
        assert not begun.acquire(blocking=False)
        goes_on.set()
        assert long.result().status == 200
        assert ask(server).status == 200


def test_who_leaves_while_the_prompt_is_made_holds_the_thread_s_place(
    roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise asking and leaving would queue work without bounds."""
    begun, goes_on = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        begun.set()
        goes_on.wait()

    monkeypatch.setattr(ApiRequest, "prepared", slow)
    with serving(roomy, max_queued_requests=1) as server:
        with server.connect() as connection:
            connection.sendall(stream_bytes(3))
            assert begun.wait(10)
        wait_for(lambda: server.service.num_active == 0)
        assert ask(server).status == 429
        goes_on.set()
        server.wait_until_idle()


def test_a_request_ends_at_its_timeout_while_a_step_hangs(roomy: Path) -> None:
    with serving(roomy, ServerSettings(request_timeout=0.2)) as server:
        server.backend.hang_after(2)
        whole = ask(server, max_tokens=9)
        assert whole.status == 504
        assert whole.error["type"] == "timeout_error"
        assert server.get("/health").status == 200
        server.backend.go_on()
        server.wait_until_idle()
        server.backend.hang_after(3)
        streamed = server.send_raw(stream_bytes(9))
        assert streamed.status == 200
        *chunks, last = events_of(streamed.body)
        assert chunks
        assert last["error"]["code"] == "deadline_exceeded"
        server.backend.go_on()
        server.wait_until_idle()


def test_a_prompt_that_takes_long_to_make_ends_at_the_timeout_too(
    roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(ApiRequest, "prepared", lambda *_, **__: goes_on.wait())
    with serving(roomy, ServerSettings(request_timeout=0.1)) as server:
        assert ask(server).status == 504
        goes_on.set()
        server.wait_until_idle()


def test_a_prompt_of_too_many_bytes_never_becomes_tokens(
    roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ApiRequest, "prepared", fail)
    with serving(roomy, ServerSettings(max_prompt_bytes=100)) as server:
        for prompt in ("é" * 51, ["a", "x" * 101]):
            refused = ask(server, prompt=prompt)
            assert refused.status == 400
            assert "100 are the most" in refused.error["message"]
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 100}]}
        refused = server.post("/v1/chat/completions", chat)
        assert (refused.status, refused.error["param"]) == (400, "messages")


def test_nobody_waits_for_a_slot_longer_than_he_may(roomy: Path) -> None:
    with serving(roomy, ServerSettings(max_queue_time=0.1), max_batch=1) as server:
        server.backend.seconds = 0.005
        with server.connect() as running:
            running.sendall(stream_bytes(200))
            wait_for(lambda: server.llm.stats().running == 1)
            for stream in (False, True):
                late = ask(server, stream=stream)
                assert late.status == 504
                assert "0.1 s for a slot" in late.error["message"]
            assert events_of(read_answer(running).body)[-1] == "[DONE]", "who runs may run on"
        server.wait_until_idle()


def test_a_slow_first_token_is_waited_for_with_pings(roomy: Path) -> None:
    with serving(roomy, ServerSettings(ping_seconds=0.05)) as server, server.connect() as client:
        server.backend.hang_after(0)
        client.sendall(stream_bytes(3))
        data = b""
        while data.count(b": waiting") < 2:
            data += client.recv(65536)
        assert b" 200 OK" in data
        server.backend.go_on()
        rest = read_all(client)
        assert b"[DONE]" in rest
        with server.client() as official:
            server.backend.hang_after(0)
            threading.Timer(0.2, server.backend.go_on).start()
            stream = official.completions.create(model=MODEL, prompt="a", max_tokens=2, stream=True)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_slot_within_two_steps(roomy: Path, stream: bool) -> None:
    with serving(roomy, max_len=2048) as server:
        server.backend.seconds = 0.002
        connection = server.connect()
        connection.sendall(stream_bytes(1900, stream=stream))
        wait_for(lambda: len(server.backend.steps) > 3)
        server.backend.hang_after(0)
        server.backend.wait_until_it_hangs()
        since = len(server.backend.steps)
        connection.close()
        wait_for(lambda: server.service.num_active == 0)
        server.backend.go_on()
        server.wait_until_idle()
        assert len(server.backend.steps) - since <= 2


def test_clients_that_drop_at_random_points_leave_nothing(roomy: Path) -> None:
    rng = random.Random(3)
    with serving(roomy, max_batch=4, max_len=2048) as server:
        server.backend.seconds = 0.001
        kept = server.connect()
        kept.sendall(stream_bytes(100))

        def drop(seconds: float, cut: int, stream: bool) -> None:
            with server.connect() as connection, suppress(TimeoutError):
                request = stream_bytes(1500, stream=stream, prompt="x" * 100)
                connection.sendall(request[: max(1, cut * len(request) // 4)])
                connection.settimeout(seconds)
                while connection.recv(4096):
                    pass

        with ThreadPoolExecutor(25) as pool:
            for _ in range(50):
                pool.submit(
                    drop, rng.uniform(0.001, 0.3), rng.choice([1, 3, 4, 4, 4]), rng.random() < 0.6
                )
        with kept:
            assert events_of(read_answer(kept).body)[-1] == "[DONE]"
        server.wait_until_idle()
        assert server.llm.stats().completion_tokens < 20_000
        assert ask(server).status == 200


def test_only_who_reads_tokens_as_they_come_keeps_steps_short(roomy: Path) -> None:
    with serving(roomy) as server:
        for stream in (False, True):
            server.backend.hang_after(0)
            with server.connect() as connection:
                connection.sendall(stream_bytes(3, stream=stream))
                server.backend.wait_until_it_hangs()
                tickets = server.llm._worker.admission._tickets
                assert [ticket.streamed for ticket in tickets] == [stream]
            server.backend.go_on()
            server.wait_until_idle()


def test_many_prompts_of_one_call_pass_through_a_small_queue(roomy: Path) -> None:
    with serving(roomy, max_batch=2, max_queued_requests=2) as server, server.client() as client:
        prompts = [f"number {index}" for index in range(30)]
        whole = client.completions.create(model=MODEL, prompt=prompts, max_tokens=3)
        assert [choice.index for choice in whole.choices] == list(range(30))
        texts = [""] * 30
        for chunk in client.completions.create(
            model=MODEL, prompt=prompts, max_tokens=3, stream=True
        ):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [choice.text for choice in whole.choices]
        server.wait_until_idle()


def test_an_error_of_one_choice_ends_the_stream_with_one_event(roomy: Path) -> None:
    """A row that is not finite, of one of two prompts; others go on."""
    with serving(roomy) as server:
        server.backend.spoiled.add(77)
        answer = server.post(
            COMPLETIONS,
            {"model": MODEL, "prompt": [[5, 6], [77]], "stream": True, "max_tokens": 50},
        )
        if answer.status == 200:
            *chunks, last = events_of(answer.body)
            assert all("error" not in chunk for chunk in chunks)
        else:
            last = answer.json()
        assert last["error"]["type"] == "server_error"
        assert "the server failed on this request" in last["error"]["message"]
        whole = server.post(COMPLETIONS, {"model": MODEL, "prompt": [77]})
        assert whole.status == 500
        assert "numbers" not in whole.error["message"], "what went wrong inside is for the log"
        assert ask(server).status == 200
        assert server.get("/ready").status == 200
        server.wait_until_idle()


def test_the_app_can_be_mounted_in_another(roomy: Path) -> None:
    """On the loop and under the path of somebody else's service, without a server of ours."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    async def main() -> None:
        async with await AsyncLLM.load(roomy, max_batch=2, max_len=256, threads=1) as llm:
            app = create_app(llm, ServerSettings(api_keys=("secret",), model_names=("mine",)))
            outer = Starlette(routes=[Mount("/llm", app)])
            transport = httpx2.ASGITransport(app=outer)
            async with openai.AsyncOpenAI(
                api_key="secret",
                base_url="http://other/llm/v1",
                http_client=httpx2.AsyncClient(transport=transport),
            ) as client:
                whole = await client.completions.create(model="mine", prompt="a", max_tokens=4)
                stream = await client.completions.create(
                    model="mine", prompt="a", max_tokens=4, stream=True
                )
                parts = [chunk.choices[0].text async for chunk in stream]
                assert "".join(parts) == whole.choices[0].text
                bare = httpx2.AsyncClient(transport=transport, base_url="http://other")
                assert (await bare.get("/llm/health")).status_code == 200
                assert (await bare.get("/llm/v1/models")).status_code == 401
                await bare.aclose()
            app.state.service.gate.close()

    with watched_models():
        asyncio.run(main())
