"""What is answered leaves at once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llama_runtime.server.protocol import Connection
from tests.runtime.server.serving import serving


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
