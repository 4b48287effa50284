"""Whatever is sent, the answer is one sentence with a status of 4xx, and nobody else is harmed."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_runtime.server import ServerSettings, protocol
from tests.runtime.server.serving import (
    HELLO,
    MODEL,
    Serving,
    events_of,
    read_answer,
    request_bytes,
    serving,
    stream_bytes,
)
from tests.watched_backend import wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
DEEP = b'{"model": "fake-llama", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}


@pytest.fixture(scope="module")
def neighbour(server: Serving) -> Iterator[None]:
    """A stream that goes on beside all of these, and whose text is in the end what it is alone."""
    alone = events_of(server.send_raw(stream_bytes(700)).body)
    with server.connect() as connection:
        server.backend.seconds = 0.001
        connection.sendall(stream_bytes(700))
        yield
        server.backend.seconds = 0.0
        beside = events_of(read_answer(connection).body)
    texts = [
        "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) for chunks in (alone, beside)
    ]
    assert texts[0] == texts[1]
    assert len(alone) > 500


def completion(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Hello", "max_tokens": 2, **more}


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 2, **more}


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (COMPLETIONS, completion(prompt=""), 400, "prompt"),
        (COMPLETIONS, completion(prompt=[]), 400, "prompt"),
        (COMPLETIONS, completion(prompt=[[]]), 400, "prompt[0]"),
        (COMPLETIONS, completion(prompt=["a", ""]), 400, "prompt[1]"),
        (COMPLETIONS, completion(prompt=[1, "a"]), 400, "prompt[1]"),
        (COMPLETIONS, completion(prompt={"a": 1}), 400, "prompt"),
        (COMPLETIONS, completion(prompt=[999]), 400, "prompt"),
        (COMPLETIONS, completion(prompt=[-1]), 400, "prompt"),
        (COMPLETIONS, completion(prompt=[10**30]), 400, "prompt"),
        (COMPLETIONS, completion(prompt="x" * 2047), 400, "max_tokens"),
        (COMPLETIONS, completion(prompt="x" * 3000), 400, "prompt"),
        (COMPLETIONS, completion(prompt="x" * 70_000), 400, "prompt"),
        (COMPLETIONS, completion(prompt=["a", "x" * 70_000]), 400, "prompt[1]"),
        (COMPLETIONS, completion(prompt=[5] * 5000), 400, "prompt"),
        (COMPLETIONS, completion(prompt="\ud800"), 400, "prompt"),
        (COMPLETIONS, completion(model="\ud800"), 400, "model"),
        (COMPLETIONS, completion(max_tokens=0), 400, "max_tokens"),
        (COMPLETIONS, completion(max_tokens=10**9), 400, "max_tokens"),
        (COMPLETIONS, completion(max_tokens="2"), 400, "max_tokens"),
        (COMPLETIONS, completion(n=1000), 400, "n"),
        (COMPLETIONS, completion(stop=["a"] * 17), 400, "stop"),
        (COMPLETIONS, completion(stop="x" * 257), 400, "stop"),
        (COMPLETIONS, completion(logprobs=21), 400, "logprobs"),
        (COMPLETIONS, completion(temperature=-1), 400, "temperature"),
        (COMPLETIONS, completion(seed=2**70), 400, "seed"),
        (COMPLETIONS, completion(logit_bias={"a": 1}), 400, "logit_bias"),
        (COMPLETIONS, completion(logit_bias={"9999": 1}), 400, "logit_bias"),
        (COMPLETIONS, completion(logit_bias={str(i): 1 for i in range(1025)}), 400, "logit_bias"),
        (COMPLETIONS, completion(stop_token_ids=[9999]), 400, "stop_token_ids"),
        (COMPLETIONS, completion(unheard_of=1), 400, "unheard_of"),
        (COMPLETIONS, completion(echo="yes"), 400, "echo"),
        (COMPLETIONS, completion(prompt=["a"] * 2049), 400, "prompt"),
        (COMPLETIONS, {"prompt": "a"}, 400, "model"),
        (COMPLETIONS, {"model": MODEL}, 400, "prompt"),
        (COMPLETIONS, completion(model="other"), 404, "model"),
        (CHAT, chat(messages=[]), 400, "messages"),
        (CHAT, chat(messages="a"), 400, "messages"),
        (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content"),
        (CHAT, chat(messages=[{"role": "bad", "content": "a"}]), 400, "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 70_000}]), 400, "messages"),
        (CHAT, chat(messages=[{"role": "user", "content": "\udc00"}]), 400, "messages"),
        (CHAT, chat(tools=[]), 400, "tools"),
        (CHAT, chat(response_format=SCHEMA), 400, "response_format.json_schema.schema"),
        (CHAT, chat(top_logprobs=3), 400, "top_logprobs"),
        (CHAT, chat(functions=[]), 400, "functions"),
        (CHAT, chat(chat_template="{{ 1 }}"), 400, "chat_template"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_body_is_named(
    server: Serving, path: str, body: dict[str, Any], status: int, param: str, stream: bool
) -> None:
    answer = server.post(path, body | {"stream": stream})
    error = answer.error
    assert answer.status == status
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b'{"a": 1,}', "is not JSON"),
        (b"\xff\xfe", "is not UTF-8 text at byte 1"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'"a"', "must be a JSON object"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": 1, "a": 2}', "two fields of one name"),
        (b'{"a": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (DEEP, "nested too deeply"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "over 120 levels deep"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_object_is_said_to_be_none(
    server: Serving, path: str, body: bytes, words: str
) -> None:
    answer = server.post(path, body)
    assert answer.status == 400
    assert words in answer.error["message"]
    assert answer.error["param"] == "body"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, "prompt"),
        ("/tokenize", {"prompt": "x" * 70_000}, "prompt"),
        ("/tokenize", {"prompt": "a", "more": 1}, "more"),
        ("/tokenize", {"messages": "a"}, "messages"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, True]}, "tokens[1]"),
        ("/detokenize", {"tokens": [258]}, "tokens[0]"),
        ("/detokenize", {"tokens": [10**30]}, "tokens[0]"),
    ],
)  # fmt: skip
def test_what_is_no_text_and_no_token_is_named(
    server: Serving, path: str, body: Any, param: str
) -> None:
    answer = server.post(path, body)
    assert (answer.status, answer.error["param"]) == (400, param)


def test_paths_and_methods_that_are_not_there_are_errors_like_any_other(server: Serving) -> None:
    for path in (
        "/page/nothing",
        "/v1",
        "/v1/chat/completions/",
        "/nothing",
        "/v1/files",
        "/metrics%00",
    ):
        assert server.get(path).status == 404
        assert server.get(path).error["type"] == "invalid_request_error"
    wrong = server.get(CHAT)
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert "use POST" in wrong.error["message"]
    assert server.send("DELETE", "/v1/models", b"", {}).status == 405
    plain = server.post(COMPLETIONS, b"{}", Content_Type="text/plain")
    assert (plain.status, plain.error["param"]) == (415, "content-type")


def test_what_is_too_long_is_refused_before_it_is_read(server: Serving) -> None:
    limit = server.service.settings.max_body_bytes
    with server.connect() as connection:
        headers = {"Content-Type": "application/json", "Content-Length": str(limit + 1)}
        connection.sendall(request_bytes("POST", CHAT, b"", headers))
        announced = read_answer(connection)
    assert (announced.status, announced.error["param"]) == (413, "body")
    with server.connect() as connection:
        headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        connection.sendall(request_bytes("POST", CHAT, b"", headers) + 5 * piece + b"0\r\n\r\n")
        assert read_answer(connection).status == 413
    long = server.get("/version", A="x" * 20_000)
    assert (long.status, long.error["param"]) == (431, "headers")
    assert server.get("/version?" + "x" * 20_000).status == 431
    with server.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\nA: " + b"x" * 300_000)
        endless = read_answer(connection)
    assert (endless.status, endless.error["param"]) == (431, "headers")


def test_what_is_no_http_is_told_so(server: Serving) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\nA b\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(data)
            answer = read_answer(connection)
        assert (answer.status, answer.error["param"]) == (400, "headers")


def test_slow_clients_are_told_so_and_hung_up_on(
    roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.05)
    with serving(roomy, ServerSettings(body_timeout=0.05)) as server:
        with server.connect() as connection:
            connection.sendall(b"GET /version HTTP/1.1\r\nHost")
            slow = read_answer(connection)
        assert (slow.status, slow.error["param"]) == (408, "headers")
        with server.connect() as connection:
            assert connection.recv(1) == b"", "who says nothing is told nothing"
        with server.connect() as connection:
            headers = {"Content-Type": "application/json", "Content-Length": "10"}
            connection.sendall(request_bytes("POST", CHAT, b"{", headers))
            slow = read_answer(connection)
        assert (slow.status, slow.error["param"]) == (408, "body")
        with server.connect() as connection:  # a second request on a connection has as much time
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\nGET /version")
            assert b"HTTP/1.1 408" in read_answer(connection).body
        server.wait_until_idle()


def test_who_does_not_read_an_answer_is_hung_up_on(
    roomy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 0.05)
    with serving(roomy, max_len=2048) as server, server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(stream_bytes(1900, n=8, logprobs=20))
        wait_for(lambda: server.llm.stats().running > 0)
        server.wait_until_idle()
        assert server.llm.stats().completion_tokens < 8 * 1900, "it was given up"


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["Hello", "\ud800", MODEL, "auto"])
)
JSON = st.recursive(
    VALUES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "name", "1"]), inner)
    ),
    max_leaves=5,
)
FIELDS = (
    *("prompt", "messages", "n", "stop", "stream", "logprobs", "top_logprobs", "seed", "user"),
    *("logit_bias", "response_format", "tools", "tool_choice", "echo", "stream_options"),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([CHAT, COMPLETIONS]), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3)
)
def test_any_body_is_answered_or_refused(server: Serving, path: str, more: dict[str, Any]) -> None:
    body = {**(chat() if path == CHAT else completion()), **more}
    if isinstance(body.get("n"), int) and body["n"] > 4:
        body["n"] = 4
    answer = server.post(path, json.dumps(body).encode())
    assert answer.status == 200 or (answer.status == 400 and answer.error)
