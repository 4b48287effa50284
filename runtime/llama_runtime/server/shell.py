"""What every request passes: a name, a key, one form of errors, one line of the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_runtime.errors import one_line
from llama_runtime.server.failures import GONE, ClientGoneError, StatusError, crowded, failure
from llama_runtime.server.keys import Keys
from llama_runtime.server.origins import Origins
from llama_runtime.server.page_files import FILES, STATE_PATH
from llama_runtime.server.request_log import RequestRecord
from llama_runtime.server.service import Service

PROBE_PATHS = ("/health", "/ready", "/ping")
OPEN_PATHS = (*PROBE_PATHS, *FILES)  # which need no key
CROWDED = "caravan.crowded"  # in the scope of a request: its connection is one too many


class JsonResponse(Response):
    """JSON in UTF-8.

    What was asked with half of a surrogate pair, and comes back in an error, is written as JSON's
    escape of it.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See starlette."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "backslashreplace")


def error_response(error: StatusError) -> JsonResponse:
    """An error as an answer."""
    return JsonResponse(error.body, error.status, error.headers)


async def http_error(_request: Request, error: Exception) -> Response:
    """What the router says of a path or a method, in the form of all errors."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = "there is nothing at this path: see GET /v1/models and the documentation"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another one")
        message = f"this path doesn't take that method: use {allowed}"
    else:
        message = one_line(error.detail)
    return error_response(StatusError(error.status_code, message, headers=error.headers))


class Shell:
    """Middleware around all routes.

    Args:
        app: the routes.
        service: what they share.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        settings = service.settings
        self._keys = Keys(settings.api_keys)
        self._origins = Origins(bool(settings.api_keys), settings.host_names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, if it may pass, and end it whatever happens."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope["caravan.record"] = RequestRecord.of(scope)

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"].append((b"x-request-id", record.id.encode()))
            await send(message)

        try:
            await self._pass(scope, receive, named_send)
        except ClientGoneError:
            record.status, record.error = GONE, "client_gone"
        except Exception as error:
            said = failure(error, self._service.refusal)
            record.error = said.code or said.kind
            if not record.status:
                await error_response(said)(scope, receive, named_send)
        finally:
            if record.status >= 400 and record.status != GONE and _path(scope) not in PROBE_PATHS:
                self._service.tally.refused[record.status] += 1
            if record.status != 200 or _path(scope) != STATE_PATH:  # which a page asks all the time
                record.write()

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Mapping[bytes, bytes] = dict(scope["headers"])
        self._check_size(scope)
        path = _path(scope)
        if path not in PROBE_PATHS:
            if CROWDED in scope:
                raise crowded()
            self._origins.check(scope["method"], headers)
        if path in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if not self._keys.admit(headers.get(b"authorization")):
            raise StatusError(
                401,
                "a key is needed that this server knows: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                param="authorization",
                headers={"WWW-Authenticate": "Bearer"},
            )
        with self._service.answering():
            await self._app(scope, receive, send)

    def _check_size(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        limit = self._service.settings.max_header_bytes
        if size > limit:
            raise StatusError(
                431,
                f"the path and the headers have {size:,} bytes, and {limit:,} at most: send less",
                param="headers",
            )


def _path(scope: Scope) -> str:
    """Without what the application is mounted at."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    assert isinstance(path, str)
    return path
