"""What is answered leaves at once, framed as the client's HTTP has it."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path

import pytest

from llama_runtime.server.protocol import Connection
from tests.runtime.server.serving import events_of, serving, stream_bytes


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whether connections send without waiting, as each has read something."""
    found: list[int] = []
    received = Connection.data_received

    def data_received(self: Connection, data: bytes) -> None:
        sock = self.transport.get_extra_info("socket")
        found.append(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        received(self, data)

    monkeypatch.setattr(Connection, "data_received", data_received)
    return found


def test_no_answer_waits_for_a_client_s_acknowledgement(roomy: Path, seen: list[int]) -> None:
    """Headers and a body are two pieces: the kernel would hold the second one for 40 ms."""
    with serving(roomy) as server:
        assert server.get("/version").status == 200
    assert seen
    assert all(seen)


def test_streams_are_framed_as_the_client_s_version_of_http_has_it(roomy: Path) -> None:
    asked = stream_bytes(20, temperature=0)
    with serving(roomy) as server:
        with server.connect() as connection:
            connection.sendall(asked)
            answer = http.client.HTTPResponse(connection, method="POST")  # which reads the chunks
            answer.begin()
            body = answer.read()
            assert connection.recv(1) == b"", "and nothing after the last"
        older = server.send_raw(asked.replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    assert answer.getheader("transfer-encoding") == "chunked"
    assert "transfer-encoding" not in older.headers
    texts = [
        [event["choices"][0]["text"] for event in events_of(one)[:-1]] for one in (body, older.body)
    ]
    assert len(texts[0]) > 10
    assert texts[0] == texts[1]
