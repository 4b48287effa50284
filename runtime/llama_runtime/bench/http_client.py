"""As much of HTTP/1.1 as a load generator needs: one request a connection, answers as they come."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from llama_runtime.errors import RequestError

MAX_HEAD_BYTES = 64 * 1024
MAX_LINE_BYTES = 4 * 2**20  # of a stream of events
MAX_BODY_BYTES = 16 * 2**20  # of an answer that is read whole


class BrokenAnswerError(Exception):
    """What came is no HTTP, or ended too early."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where a server is.

    Attributes:
        host: its name or address.
        port: its port.
        path: before all its routes, without a slash at its end.
        secure: whether it is spoken to through TLS.
    """

    host: str
    port: int
    path: str
    secure: bool

    @classmethod
    def at(cls, url: str) -> Server:
        """From ``http://host:8000`` or ``https://host/path``; a ``/v1`` at its end may be left out.

        Raises:
            RequestError: it isn't of that form.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        plain = url.isascii() and url.isprintable() and " " not in url
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise RequestError(
                f"--serve must be a URL such as http://127.0.0.1:8000, not {url!r:.200}",
                param="serve",
            )
        if parts.username or parts.query or parts.fragment:
            raise RequestError(
                "--serve takes a URL without user, query and fragment; a key goes into "
                "LLAMA_RUN_API_KEY or --api-key-file",
                param="serve",
            )
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), path, secure)

    @property
    def address(self) -> str:
        """Host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Answer:
    """An answer whose head has been read.

    Args:
        status: such as 200.
        headers: by name in lower case.
        reader: what follows.
    """

    def __init__(
        self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader
    ) -> None:
        self.status = status
        self._headers = headers
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes.

        Raises:
            BrokenAnswerError: it ends before its end.
        """
        if "chunked" in self._headers.get("transfer-encoding", "").lower():
            while size := _hexadecimal(await _line(self._reader)):
                yield await _exactly(self._reader, size)
                if await _line(self._reader):
                    raise BrokenAnswerError("a chunk is longer than it says")
            while await _line(self._reader):  # trailers
                pass
            return
        length = self._headers.get("content-length")
        if length is None:
            while piece := await self._reader.read(65536):
                yield piece
            return
        left = int(length) if length.isdigit() else 0
        while left:
            piece = await self._reader.read(min(left, 65536))
            if not piece:
                raise BrokenAnswerError("the connection was closed in the middle of the answer")
            left -= len(piece)
            yield piece

    async def whole(self) -> bytes:
        """All of the body.

        Raises:
            BrokenAnswerError: it ends before its end, or never does.
        """
        found = bytearray()
        async for piece in self.pieces():
            found += piece
            if len(found) > MAX_BODY_BYTES:
                raise BrokenAnswerError(f"the answer has more than {MAX_BODY_BYTES:,} bytes")
        return bytes(found)

    async def events(self) -> AsyncIterator[bytes]:
        """The data of each server-sent event, as it comes.

        Raises:
            BrokenAnswerError: as for ``pieces``, or a line has no end.
        """
        held = b""
        async for piece in self.pieces():
            *lines, held = (held + piece).split(b"\n")
            if len(held) > MAX_LINE_BYTES:
                raise BrokenAnswerError(f"a line has more than {MAX_LINE_BYTES:,} bytes")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line.removeprefix(b"data:").strip()


@asynccontextmanager
async def connected(
    server: Server, tls: ssl.SSLContext | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, closed in the end.

    Raises:
        OSError: there is none.
    """
    reader, writer = await asyncio.open_connection(
        server.host, server.port, ssl=tls if server.secure else None, limit=MAX_HEAD_BYTES
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()  # a farewell of TLS would keep the next request waiting
        with suppress(OSError):
            await writer.wait_closed()


async def ask(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    server: Server,
    method: str,
    route: str,
    headers: Mapping[str, str],
    body: bytes = b"",
) -> Answer:
    """Send a request and wait for the head of its answer.

    Raises:
        BrokenAnswerError: what comes is no HTTP.
        OSError: the connection breaks.
    """
    reader, writer = connection
    given = {
        "Host": server.address,
        "Connection": "close",
        "Accept": "*/*",
        "User-Agent": "llama-run-bench",
        **({"Content-Type": "application/json", "Content-Length": str(len(body))} if body else {}),
        **headers,
    }
    lines = [f"{method} {server.path}{route} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in given.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
    await writer.drain()
    status = 100
    while 100 <= status < 200:  # "go on", before the answer itself
        status = _status(await _line(reader))
        found = {}
        while line := await _line(reader):
            name, _, value = line.partition(":")
            found[name.strip().lower()] = value.strip()
    return Answer(status, found, reader)


def _status(line: str) -> int:
    protocol, _, rest = line.partition(" ")
    if not protocol.startswith("HTTP/1.") or not rest[:3].isdigit():
        raise BrokenAnswerError("the answer isn't HTTP/1.1")
    return int(rest[:3])


async def _line(reader: asyncio.StreamReader) -> str:
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        raise BrokenAnswerError("the connection was closed in the middle of the answer") from error
    except asyncio.LimitOverrunError as error:
        raise BrokenAnswerError(f"a line has more than {MAX_HEAD_BYTES:,} bytes") from error
    return line.rstrip(b"\r\n").decode("latin-1")


def _hexadecimal(line: str) -> int:
    size = line.partition(";")[0].strip()
    try:
        return int(size, 16)
    except ValueError:
        raise BrokenAnswerError("the size of a chunk is no number") from None


async def _exactly(reader: asyncio.StreamReader, size: int) -> bytes:
    if size > MAX_BODY_BYTES:
        raise BrokenAnswerError(f"a chunk has more than {MAX_BODY_BYTES:,} bytes")
    try:
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise BrokenAnswerError("the connection was closed in the middle of the answer") from error
