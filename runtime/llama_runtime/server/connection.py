"""The client's end of a request: its body, and whether it is still there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from starlette.types import Receive, Scope

from llama_runtime.errors import RequestError
from llama_runtime.server.bodies import Bodies
from llama_runtime.server.failures import ClientGoneError, StatusError
from llama_runtime.server.settings import ServerSettings

_JSON = "application/json"


async def read_body(
    scope: Scope, receive: Receive, settings: ServerSettings, bodies: Bodies
) -> bytes:
    """The body of a request.

    Args:
        scope: of the request.
        receive: gives the parts of its body.
        settings: what a body may be.
        bodies: counts it while it comes.

    Raises:
        QueueFullError: there is no room for it beside the others.
        StatusError: it is no JSON by its header, is too long, or takes too long to come.
        ClientGoneError: the client hung up.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != _JSON.encode():  # a page in a browser can't send this one elsewhere unasked
        raise StatusError(
            415, f"the body must be JSON: send it with Content-Type: {_JSON}", param="content-type"
        )
    limit = settings.max_body_bytes
    given = headers.get(b"content-length", b"0")
    if given.isdigit() and (len(given) > 18 or int(given) > limit):
        raise _too_long(limit)
    chunks: list[bytes] = []
    size = 0
    try:
        with bodies.arriving(int(given) if given.isdigit() else 0) as take:
            async with asyncio.timeout(settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError("the client hung up while it sent its request")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise _too_long(limit)
                    take(len(chunks[-1]))
                    if not message.get("more_body", False):
                        return b"".join(chunks)
    except TimeoutError:
        raise StatusError(
            408,
            f"the body hasn't come within {settings.body_timeout:g} s: send it faster",
            param="body",
        ) from None


def parse_json(data: bytes) -> Any:
    """A body as what it says.

    Raises:
        RequestError: it is no JSON, names a field twice, or holds a number without bounds.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(f"is not UTF-8 text at byte {error.start + 1}") from None
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise _wrong(
            f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise _wrong("is nested too deeply: flatten it") from None
    except RequestError:
        raise
    except ValueError:  # Python's own bound on the digits of a whole number
        raise _wrong("holds a number of thousands of digits") from None


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Give up what is done inside when the client hangs up.

    The body has to be read before; the last message of the answer is to be sent after.

    Raises:
        ClientGoneError: it did.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise ClientGoneError("the client hung up") from None
        raise
    finally:
        watcher.cancel()


def _too_long(limit: int) -> StatusError:
    return StatusError(
        413, f"the body has more than {limit:,} bytes, the most that is taken", param="body"
    )


def _wrong(problem: str) -> RequestError:
    return RequestError(f"the body {problem}", param="body")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _wrong("has an object with two fields of one name: leave one out")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _wrong(f"holds {name}, which is no JSON")
