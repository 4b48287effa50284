"""Connections of uvicorn's, with what it lacks: patience that ends, and errors of one form.

A client that sends its headers slowly, or doesn't read its answer, holds a connection without this
for ever; and what can't be read as HTTP is answered in the form of all errors.
"""

from __future__ import annotations

import asyncio
import json
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama_runtime.server.failures import StatusError

HEADER_SECONDS = 15.0  # for the headers of a request, from its first byte on
WRITE_SECONDS = 60.0  # that a client may take to read what doesn't fit into the buffers
_SENTENCES = {
    400: "this can't be read as a request of HTTP/1.1",
    408: f"the headers haven't come within {HEADER_SECONDS:g} s: send them faster",
    431: "the headers are too long: send less",
}


class Connection(H11Protocol):
    """One connection; see ``H11Protocol``."""

    _headers_due: asyncio.TimerHandle | None = None
    _write_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._cancel_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request, or of several."""
        super().data_received(data)
        self._look_for_headers()

    def on_response_complete(self) -> None:
        """An answer has been sent; what has come of the next request is read now."""
        super().on_response_complete()
        self._look_for_headers()

    def pause_writing(self) -> None:
        """The client doesn't read as fast as it is answered."""
        super().pause_writing()
        self._write_due = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._write_due is not None:
            self._write_due.cancel()
            self._write_due = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what can't be read as a request; see ``H11Protocol``.

        Args:
            msg: uvicorn's words. It calls this where it has caught an error of h11's, which knows
                better.
        """
        del msg
        self._hang_up(getattr(sys.exc_info()[1], "error_status_hint", 400))

    def _hang_up(self, status: int) -> None:
        said = _SENTENCES.get(status, _SENTENCES[400])
        body = json.dumps(StatusError(status, said, param="headers").body).encode()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            events = (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _look_for_headers(self) -> None:
        """Wait for the rest of them where they have begun, and only there."""
        if self.conn.their_state is not h11.IDLE:
            if self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None
        elif self._headers_due is None and self.conn.trailing_data[0]:
            self._await_headers()

    def _await_headers(self) -> None:
        self._headers_due = self.loop.call_later(HEADER_SECONDS, self._headers_late)

    def _headers_late(self) -> None:
        self._headers_due = None
        if self.conn.trailing_data[0]:
            self._hang_up(408)
        else:  # nobody has said anything
            self.transport.close()

    def _cancel_timers(self) -> None:
        for timer in (self._headers_due, self._write_due):
            if timer is not None:
                timer.cancel()
        self._headers_due = self._write_due = None
