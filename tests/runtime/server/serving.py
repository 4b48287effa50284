"""A server of its own thread on a free port, with a model that a test controls."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.server import ServerSettings, Service
from llama_runtime.server.command import server_of
from llama_runtime.server.places import MAX_CONNECTIONS
from tests.runtime.conftest import use_fakes
from tests.watched_backend import PATIENCE, Watched, wait_for

MODEL = "fake-llama"
HELLO = [{"role": "user", "content": "Hello"}]
COMPLETIONS = "/v1/completions"
# Each kind of request that makes work, and is refused where there is too much of it.
WORK: tuple[tuple[str, dict[str, object]], ...] = (
    (COMPLETIONS, {"model": MODEL, "prompt": "a"}),
    (COMPLETIONS, {"model": MODEL, "prompt": "a", "stream": True}),
    ("/v1/chat/completions", {"model": MODEL, "messages": HELLO}),
    ("/tokenize", {"prompt": "a"}),
)


@dataclass
class Answer:
    """What came over a plain socket."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        """The error, in the one form that there is."""
        said = self.json()
        assert set(said) == {"error"}
        assert set(said["error"]) == {"message", "type", "param", "code"}
        message = said["error"]["message"]
        assert isinstance(message, str)
        assert message
        assert "\n" not in message
        assert "Traceback" not in message
        return said["error"]


@dataclass
class Serving:
    """A server that runs.

    Attributes:
        port: of the loopback.
        service: what it serves.
        llm: the model.
        backend: what stands for the model's graph.
    """

    port: int
    service: Service
    llm: AsyncLLM
    backend: Watched

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", retries: int = 0) -> openai.OpenAI:
        """The official client; used as a context manager, it closes its connections."""
        return openai.OpenAI(
            api_key=key, base_url=f"{self.url}/v1", max_retries=retries, timeout=PATIENCE
        )

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def post(self, path: str, body: object, **headers: str) -> Answer:
        """A request with a body, as bytes or to be made JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send("POST", path, data, given | named)

    def get(self, path: str, **headers: str) -> Answer:
        return self.send("GET", path, b"", headers)

    def send(self, method: str, path: str, data: bytes, headers: dict[str, str]) -> Answer:
        return self.send_raw(request_bytes(method, path, data, headers))

    def send_raw(self, request: bytes) -> Answer:
        with self.connect() as connection:
            connection.sendall(request)
            return read_answer(connection)

    @property
    def is_idle(self) -> bool:
        stats = self.llm.stats()
        busy = stats.running or stats.waiting or self.service.num_active
        return not busy and not self.service.gate.places

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.is_idle)


def request_bytes(
    method: str, path: str, data: bytes = b"", headers: dict[str, str] | None = None
) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: a", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def stream_bytes(max_tokens: int, **more: object) -> bytes:
    """A request for a stream, as a client that won't wait for all of it sends it."""
    body = {"model": MODEL, "prompt": "Hello", "stream": True, "max_tokens": max_tokens}
    data = json.dumps(body | {"ignore_eos": True} | more).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    return request_bytes("POST", COMPLETIONS, data, headers)


def read_answer(connection: socket.socket) -> Answer:
    """All that comes until the server hangs up."""
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return Answer(int(first.split()[1]), headers, body)


def unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        found += rest[: int(size, 16)]
        data = rest[int(size, 16) + 2 :]
        if size == b"0":
            break
    return found


def events_of(body: bytes) -> list[Any]:
    """The events of a stream; its last line as it is."""
    found: list[Any] = []
    for line in body.decode("ascii").split("\n\n"):
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found


@contextmanager
def watched_models() -> Iterator[list[Watched]]:
    """Models in this process run on `Watched` backends, which come to stand here."""
    made: list[Watched] = []

    def make(num_slots: int, capacity: int, vocab_size: int, num_prefix_blocks: int) -> Watched:
        made.append(Watched(num_slots, capacity, vocab_size, num_prefix_blocks))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        use_fakes(patch, make)
        yield made


@contextmanager
def serving(
    bundle: Path,
    settings: ServerSettings | None = None,
    *,
    max_batch: int = 4,
    max_len: int = 256,
    max_queued_requests: int = 1024,
    max_queued_tokens: int = 1_000_000,
    max_connections: int = MAX_CONNECTIONS,
) -> Iterator[Serving]:
    """A server, until the block ends."""
    with watched_models() as backends:
        llm = AsyncLLM(
            bundle,
            max_batch=max_batch,
            max_len=max_len,
            threads=1,
            max_queued_requests=max_queued_requests,
            max_queued_tokens=max_queued_tokens,
        )
        service = Service(settings or ServerSettings(), llm)
        with listening(service, max_connections) as port:
            try:
                yield Serving(port, service, llm, backends[0])
            finally:
                backends[0].go_on()
                asyncio.run(llm.close())


@contextmanager
def listening(service: Service, max_connections: int = MAX_CONNECTIONS) -> Iterator[int]:
    """A service behind a port, until the block ends."""
    server = server_of(service, max_connections)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        service.gate.close()
        assert not thread.is_alive()
