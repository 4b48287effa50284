"""A client of HTTP/1.1 over plain sockets, which can misbehave wherever it likes.

A library's client sends whole requests and reads all that comes. This one stops where a proof wants
it to: it hangs up after any byte, politely or by a reset, and reads as slowly as it is told.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 150.0  # seconds without an answer, after which there is none
_EVENT = b"data: "
_DONE = b"data: [DONE]"


@dataclass(slots=True)
class Reply:
    """What came.

    Attributes:
        status: of HTTP; 0 if no whole answer came.
        headers: with names in lower case.
        body: all of it.
        seconds: from the request's first byte to the answer's last.
        ended: when that was, by the monotonic clock.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0
    ended: float = 0.0

    @property
    def is_stream(self) -> bool:
        """Whether it came as events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")

    def json(self) -> Any:
        """The body as what it says."""
        return json.loads(self.body)

    def events(self) -> list[bytes]:
        """The events of a stream; comments are none."""
        return [one for one in self.body.split(b"\n\n") if one.startswith(_EVENT)]

    @property
    def error(self) -> Any:
        """The error that it ends with, or None."""
        if self.is_stream:
            events = self.events()
            last = events[-1].removeprefix(_EVENT) if events else b"{}"
            return None if last == b"[DONE]" else json.loads(last).get("error")
        return self.json().get("error") if self.status >= 400 else None

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is missing."""
        if not self.is_stream:
            return self.status != 0
        events = self.events()
        return bool(events) and events[-1] == _DONE

    @property
    def completion_tokens(self) -> int:
        """As its usage says; a stream has one if that was asked for."""
        said = json.loads(self.events()[-2].removeprefix(_EVENT)) if self.is_stream else self.json()
        tokens: int = said["usage"]["completion_tokens"]
        return tokens


def request_bytes(
    method: str,
    path: str,
    body: object = None,
    *,
    key: str | None = None,
    keep: bool = False,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A request.

    Args:
        method: of HTTP.
        path: that is asked.
        body: bytes as they are, or what is to be JSON; None for none.
        key: of the server, if it wants one.
        keep: whether the connection is for more requests.
        headers: more of them.
    """
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost"]
    if not keep:
        lines.append("Connection: close")
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


class Connection:
    """One connection; a context manager that closes it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._started = 0.0
        self.reply = Reply()

    @classmethod
    async def to(cls, port: int, *, window: int | None = None) -> Connection:
        """One to a port of the loopback.

        Args:
            port: of the server.
            window: bytes that the system may hold for a client who doesn't read; None for any.
        """
        made = socket.socket()
        made.setblocking(False)
        if window is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        try:
            await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
        except BaseException:
            made.close()
            raise
        limit = 2**16 if window is None else window
        return cls(*await asyncio.open_connection(sock=made, limit=limit))

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._started = self._started or time.monotonic()
        self._writer.write(data)
        await self._writer.drain()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body of the next answer as it comes; its head is in ``reply`` from the first on."""
        self.reply = Reply()
        while (head := await self._reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 1"):
            pass
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        self.reply.headers = headers
        status = int(first.split()[1])
        yield b""  # the head is here
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readexactly(2)
        else:
            left = int(headers["content-length"])
            while left:
                piece = await self._reader.read(min(left, 2**16))
                if not piece:
                    raise asyncio.IncompleteReadError(piece, left)
                left -= len(piece)
                yield piece
        self.reply.status = status  # all of it has come

    async def answer(self, pause: float = 0.0) -> Reply:
        """The next answer, whole; its status is 0 if it broke off.

        Args:
            pause: seconds between two of its pieces.
        """
        parts: list[bytes] = []
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            async for piece in self.pieces():
                parts.append(piece)
                if pause:
                    await asyncio.sleep(pause)
        self.reply.body = b"".join(parts)
        self.reply.ended = time.monotonic()
        self.reply.seconds = self.reply.ended - self._started
        self._started = 0.0
        return self.reply

    async def ask(self, request: bytes) -> Reply:
        """Send a request and read its answer."""
        with suppress(ConnectionError):  # an answer may have come before all was sent
            await self.send(request)
        return await self.answer()

    def hang_up(self, *, rudely: bool = False) -> None:
        """Close it, or reset it, with whatever is under way."""
        if rudely:
            made = self._writer.get_extra_info("socket")
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort() if rudely else self._writer.close()

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


async def ask(port: int, request: bytes, *, patience: float = PATIENCE) -> Reply:
    """Ask something on a connection of its own.

    Args:
        port: of the server.
        request: see ``request_bytes``; one that ends the connection.
        patience: seconds to wait.

    Returns:
        The answer; its status is 0 if none came, or broke off.
    """
    try:
        async with asyncio.timeout(patience), await Connection.to(port) as connection:
            return await connection.ask(request)
    except (TimeoutError, OSError):
        return Reply()
