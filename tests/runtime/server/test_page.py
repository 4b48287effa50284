"""The page's numbers are true, hold no text and wait for no step; and whose pages may ask."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import pytest

from llama_runtime.progress import Console
from llama_runtime.server import ServerSettings, Service, command
from llama_runtime.server.metrics import NUM_FINE, PER_DOUBLING, SHORTEST, Tally
from llama_runtime.server.origins import host_of, loopback_names
from llama_runtime.server.page_files import FILES
from llama_runtime.server.page_state import MAX_SHOWN
from tests.runtime.server.serving import (
    HELLO,
    MODEL,
    Serving,
    listening,
    read_answer,
    request_bytes,
    serving,
    stream_bytes,
)
from tests.watched_backend import wait_for

SECRET = "a secret prompt of thirty-two bytes"
POST = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")


def state_of(server: Serving) -> Any:
    answer = server.get("/page/state")
    assert answer.status == 200
    assert answer.headers["cache-control"] == "no-store"
    assert SECRET not in answer.body.decode()
    return answer.json()


def test_the_state_shows_who_runs_and_who_waits_while_a_step_hangs(roomy: Any) -> None:
    """Slots fill as tokens come; what ends is shown no more."""
    with serving(roomy, max_batch=2) as server:
        idle = state_of(server)
        assert (idle["state"], idle["slots"], idle["running"]) == ("ready", 2, [])
        server.backend.seconds = 0.01
        clients = [server.connect() for _ in range(2)]
        for client in clients:
            client.sendall(stream_bytes(200, prompt=SECRET))
        wait_for(lambda: [one["tokens"] > 0 for one in state_of(server)["running"]] == [True] * 2)
        server.backend.hang_after(0)
        server.backend.wait_until_it_hangs()
        clients.append(server.connect())
        clients[-1].sendall(stream_bytes(50, prompt=SECRET * 2, n=3, stream=False))
        wait_for(lambda: server.llm.stats().waiting >= 1)

        began = time.monotonic()
        state = state_of(server)
        assert time.monotonic() - began < 2, "the state waits for the step"
        assert state["num_waiting"] >= 1
        first, second = state["running"]
        assert {first["slot"], second["slot"]} == {0, 1}
        assert first["read"] == first["prompt"] == len(SECRET)
        assert 1 <= first["tokens"] < first["max_tokens"] == 200
        assert first["request"] != second["request"]
        assert 0 < first["age"] < 20

        server.backend.hang_after(3)
        server.backend.wait_until_it_hangs()
        later = state_of(server)
        assert [one["id"] for one in later["running"]] == [first["id"], second["id"]]
        assert later["running"][0]["tokens"] > first["tokens"]
        assert later["completion_tokens"] > state["completion_tokens"]
        assert later["time"] > state["time"]
        assert [one["prompt"] for one in later["waiting"]] == [2 * len(SECRET)] * 3
        assert later["num_waiting"] == 3
        assert len({one["request"] for one in later["waiting"]}) == 1
        for client in clients:
            client.close()
        server.backend.go_on()
        server.wait_until_idle()
        assert (state_of(server)["running"], state_of(server)["waiting"]) == ([], [])
        assert not server.service.activity.calls


def test_a_prompt_is_shown_while_it_is_read(roomy: Any) -> None:
    with serving(roomy, max_len=2048) as server, server.connect() as client:
        server.backend.hang_after(1)
        client.sendall(stream_bytes(5, prompt="x" * 1900))
        server.backend.wait_until_it_hangs()
        (one,) = state_of(server)["running"]
        assert one["tokens"] == 0
        assert 0 < one["read"] < one["prompt"] == 1900


def test_of_many_that_wait_some_are_shown(roomy: Any) -> None:
    with serving(roomy, max_batch=1, max_len=64) as server:
        server.backend.hang_after(2)
        many = MAX_SHOWN + 5
        with server.connect() as client:
            client.sendall(stream_bytes(20, n=2))
            server.backend.wait_until_it_hangs()
            clients = [server.connect() for _ in range(many)]
            for one in clients:
                one.sendall(stream_bytes(5))
            wait_for(lambda: server.llm.stats().waiting == many + 1)
            wait_for(lambda: not server.service.gate.places)  # what isn't tokens yet isn't shown
            server.backend.hang_after(1)
            server.backend.wait_until_it_hangs()
            wait_for(lambda: len(state_of(server)["waiting"]) == MAX_SHOWN)
            state = state_of(server)
            assert state["num_waiting"] == many + 1
            ids = [one["id"] for one in state["waiting"]]
            assert ids == sorted(ids)
            for one in clients:
                one.close()
        server.backend.go_on()
        server.wait_until_idle()


def test_latencies_are_counted_once_a_sequence_and_once_a_gap(roomy: Any) -> None:
    with serving(roomy) as server:
        server.backend.seconds = 0.02
        body = {"model": MODEL, "prompt": ["one", "two"], "n": 2, "max_tokens": 5}
        assert server.post("/v1/completions", body | {"ignore_eos": True}).status == 200
        state = state_of(server)
        assert sum(state["first_token"]["counts"]) == 2 * 2
        assert sum(state["between"]["counts"]) == 2 * 2 * 4
        quickest = next(i for i, count in enumerate(state["between"]["counts"]) if count)
        assert SHORTEST * 2 ** (quickest / PER_DOUBLING) > 0.015
        assert state["completion_tokens"] == 20
        assert state["finished"] == 4


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.0123, 0.5, 3.0, 127.0, 1e6])
def test_a_time_is_counted_in_the_bucket_that_holds_it(seconds: float) -> None:
    durations = Tally().fine_gap
    durations.observe(seconds)
    assert sum(durations.counts) == 1
    bucket = durations.counts.index(1)
    end = SHORTEST * 2 ** (bucket / PER_DOUBLING)
    assert bucket == NUM_FINE - 1 or seconds <= end * (1 + 1e-9)
    assert bucket == 0 or seconds > end / 2 ** (1 / PER_DOUBLING) * (1 - 1e-9)


def test_the_state_is_told_while_the_model_loads_and_after_the_engine_has_failed(
    roomy: Any,
) -> None:
    loading = Service(ServerSettings())
    with listening(loading) as port:
        server = Serving(port, loading, None, None)  # type: ignore[arg-type]
        assert state_of(server).keys() == {"state", "time"}
        assert state_of(server)["state"] == "loading"
        assert server.get("/").status == 200
    with serving(roomy) as server:
        server.backend.failure = MemoryError("no more")
        for _ in range(2):  # the first may have been the request's own fault
            assert server.post("/v1/completions", {"model": MODEL, "prompt": "a"}).status >= 500
        wait_for(lambda: state_of(server)["state"] == "failed")
        assert state_of(server)["running"] == []


def test_the_files_of_the_page_name_nothing_outside_and_run_nothing_inline(
    server: Serving,
) -> None:
    for path in FILES:
        answer = server.get(path)
        assert answer.status == 200
        policy = dict(
            part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
        )
        assert policy.pop("frame-ancestors") == policy.pop("base-uri") == "'none'"
        assert policy.pop("default-src") == policy.pop("form-action") == "'none'"
        assert set(policy.values()) == {"'self'"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        text = answer.body.decode()
        without_namespace = text.replace("http://www.w3.org/2000/svg", "")
        assert "//" not in "".join(
            line for line in without_namespace.splitlines() if not line.startswith("//")
        ).replace("// ", ""), path
        assert "innerHTML" not in text
        assert "Storage" not in text
        assert "document.cookie" not in text
    assert server.get("/page/").status == 404
    assert server.get("/page/..%2fshell.py").status == 404


def test_the_page_says_whether_a_key_is_needed(server: Serving, roomy: Any) -> None:
    assert b'data-locked="no"' in server.get("/").body
    with serving(roomy, ServerSettings(api_keys=("key-one",))) as other:
        page = other.get("/")
        assert b'data-locked="yes"' in page.body
        assert b"key-one" not in page.body
        assert other.get("/page/state").status == 401
        assert other.get("/page/state", Authorization="Bearer key-one").status == 200


def test_asking_for_the_state_fills_no_log(
    server: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "llama_runtime"):
        state_of(server)
        server.send("POST", "/page/state", b"", {})
        server.get("/version")
        wait_for(lambda: len(caplog.records) >= 2)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [(one["path"], one["status"]) for one in lines] == [
        ("/page/state", 405),
        ("/version", 200),
    ]


def ask(server: Serving, method: str, path: str, **headers: str) -> Any:
    """With headers of a browser, in place of those that every request has here."""
    request = request_bytes(method, path, b"", {}).decode("latin-1")
    lines = [line for line in request.split("\r\n") if not line.startswith("Host:")]
    lines[1:1] = [f"{name}: {value}" for name, value in headers.items() if value]
    with server.connect() as connection:
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        return read_answer(connection)


@pytest.fixture(scope="module")
def local(roomy: Any) -> Any:
    """A server as `llama-run serve` starts it on the loopback, without keys."""
    names = loopback_names("My-Machine.local.")
    with serving(roomy, ServerSettings(host_names=names)) as running:
        yield running


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.0.1.1", "[::1]:8000", "[::1]"),
        *("my-machine.local:80", "localhost.:80"),
    ],
)
def test_the_loopback_answers_to_its_own_names(local: Serving, host: str) -> None:
    for path in ("/", "/page/state", "/v1/models"):
        assert ask(local, "GET", path, Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"),
        *("192.0.2.1", "0.0.0.0", "[::]", "[::1].evil.example", "127.0.0.1@evil.example", " "),
    ],
)
def test_the_loopback_answers_to_no_other_name(local: Serving, host: str) -> None:
    """A page may have its own name point to the loopback after it has come from elsewhere."""
    for path in ("/", "/page/state", "/v1/models", "/nothing"):
        answer = ask(local, "GET", path, Host=host)
        assert answer.status == 400, (path, host)
        assert answer.error["param"] in ("host", "headers")
    for path in POST:
        assert ask(local, "POST", path, Host=host).status == 400
    assert ask(local, "GET", "/health", Host="10.0.0.1:8000").status == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://localhost:3000", "http://localhost", "x", ""],
)
def test_no_page_of_another_origin_may_use_a_server_without_keys(
    local: Serving, roomy: Any, origin: str
) -> None:
    headers = {"Host": "localhost:8000", "Origin": origin, "Content-Type": "application/json"}
    expected = 400 if not origin else 403  # 400: the body, which is none
    for path in POST:
        answer = ask(local, "POST", path, **headers)
        assert answer.status == expected, path
        assert (answer.error["code"] == "cross_origin") == bool(origin)
    assert (
        ask(
            local, "POST", "/v1/completions", **(headers | {"Origin": "http://localhost:8000"})
        ).status
        == 400
    )
    assert ask(local, "OPTIONS", "/v1/completions", **headers).status in (403, 405)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", ("localhost", "127.0.0.1")),
        ("localhost", ("localhost",) * 2),
        ("0.0.0.0", None),
    ],
)
def test_llama_run_serve_knows_its_names_on_the_loopback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, host: str, expected: tuple[str, ...] | None
) -> None:
    served: list[ServerSettings] = []

    async def serve(options: command.ServeOptions, *_: object) -> None:
        served.append(options.settings)

    monkeypatch.setattr(command, "_serve", serve)
    monkeypatch.setattr(command, "log_to", lambda _: None)
    limits = dict.fromkeys(
        ("max_batch", "max_len", "threads", "devices", "prefix_tokens", "max_connections")
    )
    options = command.ServeOptions(
        bundle=tmp_path,
        settings=ServerSettings(),
        host=host,
        port=0,
        insecure=True,
        shutdown_timeout=1.0,
        max_queued_requests=1,
        max_queued_tokens=1,
        **limits,
    )
    command.run(options, Console(sys.stderr, quiet=True))
    assert [one.host_names for one in served] == [expected]


def test_with_keys_or_in_a_service_of_its_own_any_name_and_origin_may_ask(roomy: Any) -> None:
    names = loopback_names("127.0.0.1")
    settings = ServerSettings(api_keys=("k",), host_names=names)
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 1}
    with serving(roomy, settings) as server:
        asked = {"Origin": "http://app.example", "Authorization": "Bearer k"}
        assert server.post("/v1/chat/completions", body, **asked).status == 200
    with serving(roomy) as server:
        assert server.post("/v1/chat/completions", body).status == 200
        refused = server.post("/v1/chat/completions", body, Origin="http://app.example")
        assert refused.status == 403


def test_hosts_are_read_from_their_header() -> None:
    assert [host_of(one) for one in ("A.b:80", "[::1]:80", "[fe80::1]", "a.")] == [
        *("a.b", "::1", "fe80::1", "a"),
    ]
    assert {host_of(one) for one in ("[::1]a", "[a", "a]", "u@a", "a:b", "", "[")} == {""}
    assert loopback_names("::1") == ("localhost", "::1")
