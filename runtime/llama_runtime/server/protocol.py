"""Connections of uvicorn's, with what it lacks: bounds of number and time, errors of one form.

A client that sends its headers slowly, goes on with a body that was refused, or doesn't read its
answer, holds a connection without this for ever; and what can't be read as HTTP is answered in the
form of all errors. uvicorn's own bound, ``limit_concurrency``, closes none that waits: it answers
requests with a 503 that is no JSON, those of probes too.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_runtime.server.failures import StatusError, crowded
from llama_runtime.server.places import Group, Places
from llama_runtime.server.shell import CROWDED, PROBE_PATHS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER_SECONDS = 15.0  # for the headers of a request, from its first byte on
SPARE_SECONDS = 5.0  # the same where a connection is one too many
WRITE_SECONDS = 60.0  # that a client may take to read what doesn't fit into the buffers
_BODY_SECONDS = 2.0  # for what a client sends that is refused: hung up on, it might see no answer
_BODY_BYTES = 2**22
_SENTENCES = {
    400: "this can't be read as a request of HTTP/1.1",
    408: "the headers haven't come within {:g} s: send them faster",
    431: "the headers are too long: send less",
}


class Connection(H11Protocol):
    """One connection; see ``H11Protocol``.

    Args:
        places: of its server.
        given: see ``H11Protocol``.
    """

    _late: asyncio.TimerHandle | None = None
    _write_due: asyncio.TimerHandle | None = None
    _group: Group | None = None

    def __init__(self, *, places: Places, **given: Any) -> None:
        super().__init__(**given)
        header_bytes = self.config.h11_max_incomplete_event_size
        assert header_bytes is not None  # ``server_of`` says how many
        self.conn = _Framing(h11.SERVER, header_bytes)
        self._places = places
        self._patience = HEADER_SECONDS
        self._is_new = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        _send_at_once(transport)
        self._group = self._places.enter(self)
        if self._group is None:
            transport.abort()
            return
        if self._group is self._places.beyond:
            self._patience = SPARE_SECONDS
            self.app = _OneTooMany(self.app)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._cancel_timers()
        if self._group is not None:
            self._group.leave(self)
            self._group = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request, or of several."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """An answer has been sent; what has come of the next request is read now."""
        super().on_response_complete()
        self._look()
        self._watch_writing()

    def pause_writing(self) -> None:
        """The client doesn't read as fast as it is answered."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """It has caught up, but for the last few kilobytes."""
        if self._write_due is not None:
            self._write_due.cancel()
            self._write_due = None
        super().resume_writing()
        if self.cycle.response_complete:
            self._watch_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what can't be read as a request; see ``H11Protocol``.

        Args:
            msg: uvicorn's words. It calls this where it has caught an error of h11's, which knows
                better.
        """
        del msg
        self._hang_up(_unread(getattr(sys.exc_info()[1], "error_status_hint", 400)))

    def make_room(self) -> None:
        """Another connection needs the place, and this one waits for a request; see ``Group``."""
        self._group = None
        if self.transport.get_write_buffer_size():  # which closing would wait for
            self.transport.abort()
        elif self._has_begun:
            self._hang_up(crowded())
        else:
            self.transport.close()

    @property
    def _has_begun(self) -> bool:
        """Whether some of a request's headers are here."""
        return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    def _hang_up(self, error: StatusError) -> None:
        body = json.dumps(error.body).encode()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
                *((name.encode(), value.encode()) for name, value in error.headers.items()),
            ]
            events = (
                h11.Response(status_code=error.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self._watch_writing()
        self.transport.close()

    def _look(self) -> None:
        """Be patient with what the client owes, but not for ever.

        That is its first request, the rest of headers that have begun, or the rest of a body that
        has been answered already. Until it has sent it, it may have to make room for others.
        """
        theirs, lingers = self.conn.their_state, False
        if theirs is h11.IDLE:
            owes = self._is_new or self._has_begun
        else:
            self._is_new = False
            owes = lingers = theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if self._group is not None:
            self._group.note(self, waits=theirs is h11.IDLE or lingers)
        if owes and self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self._patience, self._be_late)
        elif not owes and self._late is not None:
            self._late.cancel()
            self._late = None

    def _be_late(self) -> None:
        self._late = None
        if self._has_begun:
            self._hang_up(_unread(408, self._patience))
        else:
            self.transport.close()

    def _watch_writing(self) -> None:
        """Wait for the client to read what is written, but not for ever."""
        if self._write_due is None and self.transport.get_write_buffer_size():
            self._write_due = self.loop.call_later(WRITE_SECONDS, self._end_writing)

    def _end_writing(self) -> None:
        self._write_due = None
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _cancel_timers(self) -> None:
        for timer in (self._late, self._write_due):
            if timer is not None:
                timer.cancel()
        self._late = self._write_due = None


class _Framing(h11.Connection):
    """h11's own, but for the chunks of a stream, which it takes ten times as long to frame.

    It looks at all of its state again for each, though nothing can have changed.
    """

    _is_chunked = False

    def send_with_data_passthrough(self, event: h11.Event) -> list[bytes] | None:
        """See ``h11.Connection``, whose ``send`` is this, too."""
        if self._is_chunked and isinstance(event, h11.Data):
            return [b"%x\r\n" % len(event.data), event.data, b"\r\n"] if event.data else []
        output = super().send_with_data_passthrough(event)
        head = b"".join(output or []).lower() if isinstance(event, h11.Response) else b""
        self._is_chunked = b"\r\ntransfer-encoding: chunked\r\n" in head
        return output


class _OneTooMany:
    """The application for a connection beyond the bound: one request, which knows that.

    Args:
        app: the application for all others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"connection", b"close"))
            await send(message)

        if scope["path"] not in PROBE_PATHS:
            await _drop_body(receive)
        await self._app({**scope, CROWDED: True}, receive, closing_send)


async def _drop_body(receive: Receive) -> None:
    size, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(_BODY_SECONDS):
            while more and size <= _BODY_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)


def _unread(status: int, patience: float = 0.0) -> StatusError:
    """An error about headers."""
    said = _SENTENCES.get(status, _SENTENCES[400]).format(patience)
    return StatusError(status, said, param="headers")


def _send_at_once(transport: asyncio.Transport) -> None:
    """Don't let the kernel wait for what came before to be acknowledged, which may take 40 ms.

    asyncio does so itself for sockets that were made for TCP by its number, which few are.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
