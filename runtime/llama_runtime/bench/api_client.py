"""A server of OpenAI's API, asked for completions as streams, and the times at which they come."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from typing import Any, Literal

from llama_runtime.bench.http_client import Answer, BrokenAnswerError, Server, ask, connected
from llama_runtime.bench.trace import Trace
from llama_runtime.bench.workload import Ask
from llama_runtime.errors import BackendError, RequestError, one_line

Endpoint = Literal["completions", "chat"]
ROUTES: dict[Endpoint, str] = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class ApiClient:
    """Asks one model of a server.

    Args:
        server: where it is.
        endpoint: which way of asking.
        key: what it wants to be told; None for nothing.
        timeout: seconds that a request may take in all.

    Attributes:
        model: its name; found by ``find_model`` where it isn't given.
        ignores_eos: whether requests say that completions go on past end tokens, as many servers
            understand and OpenAI's own doesn't.
        counts_usage: whether streams have said how many tokens they held; else pieces count.
    """

    def __init__(
        self,
        server: Server,
        endpoint: Endpoint,
        *,
        key: str | None,
        timeout: float,
        model: str | None = None,
    ) -> None:
        self._server, self._endpoint, self._timeout = server, endpoint, timeout
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._tls = ssl.create_default_context() if server.secure else None
        self.model = model or ""
        self.ignores_eos = True
        self.counts_usage = True

    async def find_model(self) -> None:
        """Learn the name of the server's first model, unless one was given.

        Raises:
            BackendError: there is no server, it wants a key, or it doesn't say.
        """
        if self.model:
            return
        status, body = await self._get("/v1/models")
        if status in (401, 403):
            raise BackendError(
                f"{self._server.address} wants a key (HTTP {status}): put it into "
                "LLAMA_RUN_API_KEY, or a file for --api-key-file"
            )
        try:
            name = json.loads(body)["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise BackendError(
                f"{self._server.address} doesn't say which models it has (GET /v1/models: HTTP "
                f"{status}): name one with --model"
            ) from error
        self.model = str(name)

    async def _get(self, route: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(self._timeout), connected(self._server, self._tls) as both:
                answer = await ask(both, self._server, "GET", route, self._headers)
                return answer.status, await answer.whole()
        except (OSError, BrokenAnswerError, TimeoutError) as error:
            raise BackendError(
                f"no server of OpenAI's API answers at {self._server.address} "
                f"({_kind(error)}): start it, or give its address to --serve"
            ) from error

    async def complete(self, wanted: Ask) -> Trace:
        """Ask for one completion; what goes wrong is in the trace, by kind.

        The clock begins when the connection stands, so connecting is not counted.
        """
        trace = Trace(time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout), connected(self._server, self._tls) as both:
                trace.arrived = time.perf_counter()
                body = json.dumps(self.body(wanted)).encode()
                route = ROUTES[self._endpoint]
                answer = await ask(both, self._server, "POST", route, self._headers, body)
                await self._read(answer, trace)
        except (OSError, BrokenAnswerError, TimeoutError) as error:
            trace.error = _kind(error)
        return trace

    def body(self, wanted: Ask) -> dict[str, Any]:
        """What is sent."""
        found: dict[str, Any] = {
            "model": self.model,
            "max_tokens": wanted.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignores_eos:
            found["ignore_eos"] = True
        if self._endpoint == "chat":
            found["messages"] = [{"role": "user", "content": wanted.prompt}]
        else:
            found["prompt"] = wanted.prompt
        return found

    async def _read(self, answer: Answer, trace: Trace) -> None:
        if answer.status != 200:
            trace.error = f"HTTP {answer.status}"
            trace.message = _message(await answer.whole())
            return
        usage: dict[str, Any] | None = None
        closed = False
        last = 0.0
        async for data in answer.events():
            if data == b"[DONE]":
                closed = True
                break
            event = _object(data)
            if "error" in event:
                trace.error, trace.message = "an error in the stream", _message(data)
                return
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                last = time.perf_counter()
                if _has_text(choice):
                    trace.times.append(last)
        if not closed:
            raise BrokenAnswerError("the stream ended without [DONE]")
        self._count(trace, usage, last)

    def _count(self, trace: Trace, usage: dict[str, Any] | None, last: float) -> None:
        """Take over how many tokens there were."""
        if not trace.times and last:
            trace.times.append(last)  # tokens without text, as those that end a turn
        if not trace.times:
            trace.error = "an answer without a token"
            return
        try:
            trace.input_len = int((usage or {})["prompt_tokens"])
            trace.output_len = int((usage or {})["completion_tokens"])
        except (LookupError, TypeError, ValueError):
            self.counts_usage = False
            trace.output_len = len(trace.times)

    async def probe(self, wanted: Ask) -> Trace:
        """One request to see that all is well, and whether the server knows ``ignore_eos``.

        Raises:
            BackendError: it can't be answered.
        """
        trace = await self.complete(wanted)
        if trace.error is not None and trace.error in ("HTTP 400", "HTTP 422"):
            self.ignores_eos = False
            trace = await self.complete(wanted)
        if trace.error is not None:
            raise BackendError(
                f"{self._server.address} doesn't answer a request to {ROUTES[self._endpoint]} for "
                f"{one_line(self.model, 100)}: {trace.error} {trace.message}".rstrip()
            )
        return trace


def read_key(environment: str | None, file_text: str | None) -> str | None:
    """The key, of a file before that of the environment; the first line that holds one.

    Raises:
        RequestError: there is none in the file, or it can't stand in a header.
    """
    given = environment or None
    if file_text is not None:
        lines = (line.strip() for line in file_text.splitlines())
        given = next((line for line in lines if line and not line.startswith("#")), None)
        if given is None:
            raise RequestError("--api-key-file holds no key", param="api_key_file")
    if given is not None and not (given.isascii() and given.isprintable()):
        raise RequestError("the key must be ASCII text without spaces", param="api_key_file")
    return given


def _kind(error: BaseException) -> str:
    """An error in words that are the same for all of a kind."""
    if isinstance(error, BrokenAnswerError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or type(error).__name__}"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError):
        return "the connection was closed in the middle of the answer"
    return one_line(getattr(error, "strerror", None) or error, 100)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError as error:
        raise BrokenAnswerError("an event isn't JSON") from error
    if not isinstance(found, dict):
        raise BrokenAnswerError("an event isn't a JSON object")
    return found


def _has_text(choice: Any) -> bool:
    """Whether a piece of a completion holds any of it: text, reasoning, or a call."""
    if not isinstance(choice, dict):
        raise BrokenAnswerError("a choice isn't a JSON object")
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return bool(choice.get("text"))
    names = ("content", "reasoning_content", "reasoning", "tool_calls")
    return any(delta.get(name) for name in names)


def _message(body: bytes) -> str:
    """What an error says, in one line."""
    try:
        found = json.loads(body)
    except ValueError:
        return one_line(body.decode("utf-8", "replace"), 200)
    error = found.get("error", found) if isinstance(found, dict) else found
    said = error.get("message", error) if isinstance(error, dict) else error
    return one_line(said, 200)
