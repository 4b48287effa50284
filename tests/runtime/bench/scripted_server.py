"""A server that answers each request with bytes that a test gives."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 10.0
DONE = b"data: [DONE]\n\n"


@dataclass
class Scripted:
    """A server that runs.

    Attributes:
        port: of the loopback.
        asked: the head and the body of each request.
    """

    port: int
    asked: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


Script = Callable[[str, Any], list[bytes]]


@contextmanager
def scripted(script: Script) -> Iterator[Scripted]:
    """A server until the block ends.

    Args:
        script: of the first line of a request and its body, the pieces to be sent one by one.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    server = Scripted(listener.getsockname()[1])
    threads: list[threading.Thread] = []

    def answer(connection: socket.socket) -> None:
        connection.settimeout(PATIENCE)
        with connection, suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536)
            head, _, body = data.partition(b"\r\n\r\n")
            lengths = [line for line in head.split(b"\r\n") if line.startswith(b"Content-Length")]
            while lengths and len(body) < int(lengths[0].split()[1]):
                body += connection.recv(65536)
            server.asked.append((head.decode(), json.loads(body) if body else None))
            for piece in script(head.decode().partition("\r\n")[0], server.asked[-1][1]):
                connection.sendall(piece)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threads.append(threading.Thread(target=answer, args=(connection,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield server
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in [acceptor, *threads]:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def answer(status: int, body: bytes, **headers: str) -> bytes:
    """A whole answer."""
    named = {"Content-Length": str(len(body))} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def stream_head() -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(found: object) -> bytes:
    return b"data: " + json.dumps(found).encode() + b"\n\n"


def text(said: str) -> bytes:
    """One event of a completion."""
    return event({"choices": [{"index": 0, "text": said}]})


def usage(prompt: int, completion: int) -> bytes:
    counted = {"prompt_tokens": prompt, "completion_tokens": completion}
    return event({"choices": [], "usage": counted})


def whole(*events: bytes) -> list[bytes]:
    """A stream that ends as it should."""
    return [stream_head(), *(chunk(one) for one in [*events, DONE]), b"0\r\n\r\n"]


def models(name: str = "served") -> bytes:
    return answer(200, json.dumps({"object": "list", "data": [{"id": name}]}).encode())
