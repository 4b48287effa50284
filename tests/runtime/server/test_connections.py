"""Many connections, and many bodies that come slowly: others are served, and memory is bounded."""

from __future__ import annotations

import gc
import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from types import CoroutineType

import pytest

from llama_runtime.errors import QueueFullError, RequestError
from llama_runtime.server import ServerSettings, command, places, protocol
from llama_runtime.server.bodies import Bodies
from llama_runtime.server.places import Places
from tests.runtime.server.serving import (
    MODEL,
    Answer,
    Serving,
    events_of,
    read_answer,
    request_bytes,
    serving,
    stream_bytes,
)
from tests.watched_backend import wait_for

COMPLETIONS = "/v1/completions"
KEPT = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"  # after which the connection stays open


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as clients:
        yield clients


def ask(server: Serving, **more: object) -> Answer:
    return server.post(COMPLETIONS, {"model": MODEL, "prompt": "Hello", "max_tokens": 2, **more})


def opened(server: Serving, stack: ExitStack, data: bytes = b"") -> socket.socket:
    client = stack.enter_context(server.connect())
    client.sendall(data)
    return client


def is_closed(client: socket.socket) -> bool:
    """Whether the server has hung up; what it has said before is read."""
    client.settimeout(0.001)
    try:
        while client.recv(65536):
            pass
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def status_of(client: socket.socket) -> int:
    """The status of an answer after which the connection stays open."""
    answer = HTTPResponse(client)
    answer.begin()
    answer.read()
    return answer.status


def begun_body(size: int, sent: bytes = b"") -> bytes:
    """The beginning of a request whose body has so many bytes."""
    headers = {"Content-Type": "application/json", "Content-Length": str(size)}
    return request_bytes("POST", COMPLETIONS, sent, headers)


def test_a_thousand_idle_connections_leave_others_unharmed(roomy: Path, stack: ExitStack) -> None:
    """A hundred have places; silent ones, kept ones and half requests go when others come."""
    with serving(roomy, max_connections=100) as server:
        said = (b"", KEPT, b"GET /version HTTP/1.1\r\nHo")
        server.backend.seconds = 0.002
        running = opened(server, stack, stream_bytes(240))
        wait_for(lambda: server.service.num_active == 1)
        clients = []
        for number in range(1000):
            clients.append(opened(server, stack, said[number % 3]))
            if number % 100 == 99:
                assert ask(server).status == 200
        assert events_of(read_answer(running).body)[-1] == "[DONE]"
        wait_for(lambda: sum(map(is_closed, clients)) >= 900)
        assert not any(map(is_closed, clients[-50:])), "those that came last"
        assert ask(server).status == 200
        assert server.get("/ready").status == 200


def test_the_connection_that_has_waited_longest_makes_room(roomy: Path, stack: ExitStack) -> None:
    with serving(roomy, max_connections=3) as server:
        silent, half, kept = (  # they are accepted in this order, and answered after it
            opened(server, stack, data)
            for data in (b"", b"POST /v1/completions HTTP/1.1\r\n", KEPT)
        )
        assert status_of(kept) == 200
        kept.sendall(KEPT)  # so that it has waited the least
        assert status_of(kept) == 200
        assert server.get("/version").status == 200
        wait_for(lambda: is_closed(silent))
        assert not is_closed(kept)
        opened(server, stack, KEPT)
        opened(server, stack, KEPT)
        half.settimeout(5)
        told = read_answer(half)
        assert (told.status, told.error["code"]) == (503, "too_many_connections")
        assert int(told.headers["retry-after"]) >= 1
        assert told.headers["connection"] == "close"


@pytest.mark.parametrize("size", [10, 4_000_000])
def test_one_too_many_is_told_so_and_probes_are_answered(
    roomy: Path, stack: ExitStack, size: int
) -> None:
    """All connections have requests: streams, and bodies that are still to come."""
    with serving(roomy, max_connections=4) as server:
        server.backend.hang_after(0)
        streams = [opened(server, stack, stream_bytes(3)) for _ in range(2)]
        bodies = [opened(server, stack, begun_body(1000)) for _ in range(2)]
        wait_for(lambda: server.service.num_active == 4)
        for path in ("/health", "/ping", "/ready"):
            assert server.get(path).status == 200
        for _ in range(2):
            refused = ask(server, prompt="x" * size)
            assert (refused.status, refused.error["code"]) == (503, "too_many_connections")
            assert refused.error["type"] == "server_error"
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.headers["connection"] == "close"
        assert server.service.tally.refused[503] == 2
        for client in bodies:
            assert not is_closed(client)
            client.close()
        wait_for(lambda: server.service.num_active == 2)
        server.backend.go_on()
        assert ask(server).status == 200
        assert all(events_of(read_answer(client).body)[-1] == "[DONE]" for client in streams)


def test_places_beyond_the_bound_are_few(
    roomy: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "SPARE", 2)
    with serving(roomy, max_connections=1) as server:
        opened(server, stack, begun_body(1000))
        wait_for(lambda: server.service.num_active == 1)
        silent = [opened(server, stack) for _ in range(4)]
        wait_for(lambda: is_closed(silent[0]) and is_closed(silent[1]))
        assert not is_closed(silent[2])
        assert server.get("/health").status == 200
        stack.close()


def test_a_refused_body_is_not_waited_for_for_ever(
    roomy: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slowly it goes on, and it may be sent whole before."""
    monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.3)
    with serving(roomy, ServerSettings(max_body_bytes=1000)) as server:
        begun = begun_body(5000).replace(b"Connection: close\r\n", b"")
        client = opened(server, stack, begun)
        assert status_of(client) == 413
        client.sendall(b"x" * 5000 + KEPT)
        assert status_of(client) == 200, "it may ask again"
        client.sendall(begun)
        assert status_of(client) == 413
        started = time.monotonic()
        while not is_closed(client):
            assert time.monotonic() - started < 5
            time.sleep(0.02)
            try:
                client.sendall(b"x")
            except OSError:
                break


def rss() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_slow_bodies_of_many_clients_fill_no_memory(roomy: Path, stack: ExitStack) -> None:
    """300 clients begin bodies of 4 MiB, with 300 KB each: 90 MB, of which 16 MB may be here."""
    limit, part = 16 * 2**20, b" " * 300_000
    with serving(roomy, ServerSettings(max_incoming_bytes=limit)) as server:
        before, most, clients = rss(), 0, []
        for _ in range(300):
            client = opened(server, stack, begun_body(4 * 2**20))
            client.settimeout(0.2)
            clients.append(client)
            try:
                client.sendall(part)
            except OSError:  # it has been refused
                continue
            most = max(most, server.service.bodies.size)
        wait_for(lambda: server.service.bodies.size > limit // 2)  # the server may be behind
        assert most <= limit
        wait_for(lambda: server.service.num_active < 60)
        assert rss() - before < 60e6
        assert ask(server).status == 200, "there is room for small ones"
        refused = read_answer(opened(server, stack, begun_body(4 * 2**20)))
        assert (refused.status, refused.error["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        for client in clients:
            client.close()
        wait_for(lambda: server.service.bodies.size == 0)
        whole = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 2}).encode()
        assert server.post(COMPLETIONS, whole + b" " * (4 * 2**20 - len(whole))).status == 200


def test_bodies_of_unknown_length_are_counted_as_they_come() -> None:
    bodies = Bodies(100)
    with bodies.arriving(0) as first, bodies.arriving(0) as second:
        first(60)
        second(40)
        with pytest.raises(QueueFullError, match="100 bytes of bodies are being read"):
            second(1)
        with pytest.raises(QueueFullError), bodies.arriving(1):
            pass
        assert bodies.size == 100
    assert bodies.size == 0
    with bodies.arriving(100) as whole:
        whole(100)


def test_what_a_prompt_was_made_of_is_not_kept_while_it_runs(roomy: Path, stack: ExitStack) -> None:
    """The bodies of all that wait would be gigabytes."""
    size = 1_234_567
    with serving(roomy) as server:
        server.backend.hang_after(0)
        whole = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 2}).encode()
        client = opened(server, stack, begun_body(size, whole + b" " * (size - len(whole))))
        server.backend.wait_until_it_hangs()
        wait_for(lambda: not server.service.gate.places)
        running = [one for one in gc.get_objects() if type(one) is CoroutineType]
        held = [one.cr_frame.f_locals for one in running if one.cr_frame is not None]
        assert any("generation" in names for names in held)
        values = [value for names in held for value in names.values()]
        assert not [value for value in values if isinstance(value, bytes) and len(value) == size]
        server.backend.go_on()
        assert read_answer(client).status == 200


@pytest.mark.parametrize(
    ("limit", "wanted", "expected"),
    [
        (None, None, 4096),
        (None, 100_000, 100_000),
        (20_000, None, 4096),
        (1024, None, 1024 - 64 - 128),
        (1024, 832, 832),
        (100, None, 1),
    ],
)
def test_connections_fit_below_the_limit_on_open_files(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, wanted: int | None, expected: int
) -> None:
    monkeypatch.setattr(command, "_allowed_files", lambda: limit)
    assert command._max_connections(wanted) == expected


def test_more_connections_than_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_allowed_files", lambda: 1024)
    with pytest.raises(RequestError, match="833 takes 1,025 open files") as refusal:
        command._max_connections(833)
    assert refusal.value.param == "max_connections"


def test_a_group_lets_go_of_those_that_left() -> None:
    class Waiter:
        def make_room(self) -> None:
            closed.append(self)

    closed: list[Waiter] = []
    found = Places(2)
    first, second, third = Waiter(), Waiter(), Waiter()
    assert found.enter(first) is found.enter(second) is found.within
    found.within.note(first, waits=False)
    found.within.note(second, waits=False)
    assert found.enter(third) is found.beyond
    found.beyond.leave(third)
    found.within.note(second, waits=True)
    assert found.enter(third) is found.within
    assert closed == [second]
    found.within.leave(second)  # its connection is lost later
    found.within.note(second, waits=True)
    assert len(found.within) == 2
    found.within.leave(third)
    found.within.leave(first)
    assert (len(found.within), len(found.beyond)) == (0, 0)
