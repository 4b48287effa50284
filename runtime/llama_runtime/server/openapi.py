"""The server's own description, as an OpenAPI document: ``GET /openapi.json``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from starlette.requests import Request

from llama_runtime import __version__
from llama_runtime.server import openapi_answers, openapi_requests
from llama_runtime.server.failures import RETRY_SECONDS
from llama_runtime.server.metrics_route import CONTENT_TYPE
from llama_runtime.server.openapi_schema import Schema, ref
from llama_runtime.server.page_files import FILES, STATE_PATH, media_type
from llama_runtime.server.service import Service
from llama_runtime.server.shell import OPEN_PATHS, JsonResponse

PATH = "/openapi.json"
_JSON = "application/json"
_ABOUT = """\
OpenAI's API for one model. A field that is null counts as left out; one that nothing here knows is
refused by its name. Whatever goes wrong is an Error, in a stream as its last event, which no [DONE]
follows."""
_SENTENCES = {
    400: "A field is wrong, and `param` is its path; or the request can't be read.",
    401: "No key came, or one that this server doesn't know.",
    403: "A page of another origin asks a server without keys.",
    404: "There is no such model.",
    408: "The request comes too slowly.",
    413: "The body is too long.",
    415: "The body isn't announced as JSON.",
    429: "As much waits as may.",
    431: "The path and the headers are too long.",
    500: "The request failed inside, and the log says why.",
    503: "The model loads, the server drains or is full, or the engine has failed.",
    504: "The time has passed that a request may take or wait.",
}
_EVERYWHERE = (400, 408, 431, 500, 503)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route.

    Attributes:
        method: in lower case.
        path: as starlette has it.
        summary: what it does.
        answer: the schema of its answer; None where that is no JSON.
        kind: the type of its answer.
        body: the schema of its body, if it takes one.
        chunk: the schema of its events, if it may be answered with a stream.
        statuses: those that it has beside those of every route.
    """

    method: str = "get"
    path: str
    summary: str
    answer: str | None = None
    kind: str = _JSON
    body: str | None = None
    chunk: str | None = None
    statuses: tuple[int, ...] = ()


_OF_BODIES = (404, 413, 415, 429)
_OPERATIONS = (
    Operation(
        method="post",
        path="/v1/completions",
        summary="Continue texts, or token ids.",
        answer="Completion",
        body="CompletionRequest",
        chunk="CompletionChunk",
        statuses=(*_OF_BODIES, 504),
    ),
    Operation(
        method="post",
        path="/v1/chat/completions",
        summary="Answer in a conversation.",
        answer="ChatCompletion",
        body="ChatCompletionRequest",
        chunk="ChatCompletionChunk",
        statuses=(*_OF_BODIES, 504),
    ),
    Operation(path="/v1/models", summary="The names of the model.", answer="ModelList"),
    Operation(
        path="/v1/models/{name:path}",
        summary="One of them.",
        answer="Model",
        statuses=(404,),
    ),
    Operation(
        method="post",
        path="/tokenize",
        summary="A text, or messages as the chat template lays them out, as token ids.",
        answer="Tokens",
        body="TokenizeRequest",
        statuses=_OF_BODIES,
    ),
    Operation(
        method="post",
        path="/detokenize",
        summary="Token ids as text, in which special tokens are spelled out.",
        answer="Text",
        body="DetokenizeRequest",
        statuses=_OF_BODIES,
    ),
    Operation(path="/health", summary="Whether this process is worth keeping.", answer="Status"),
    Operation(path="/ping", summary="The same as /health.", answer="Status"),
    Operation(path="/ready", summary="Whether requests are taken now.", answer="Status"),
    Operation(path="/version", summary="That of the server.", answer="Version"),
    Operation(path="/metrics", summary="For Prometheus.", kind=CONTENT_TYPE),
    Operation(path=PATH, summary="This document.", answer="Document"),
    Operation(
        path=STATE_PATH,
        summary="What the batch is doing, in numbers.",
        answer="PageState",
    ),
    *(
        Operation(path=path, summary="Of the page.", kind=media_type(name))
        for path, name in FILES.items()
    ),
)


class OpenApiRoute:
    """``/openapi.json``: the same while the model loads and after the engine has failed.

    Args:
        service: what all routes share.
    """

    def __init__(self, service: Service) -> None:
        self._document = openapi_document(has_keys=bool(service.settings.api_keys))

    async def answer(self, _request: Request) -> JsonResponse:
        """The document."""
        return JsonResponse(self._document)


def openapi_document(*, has_keys: bool) -> dict[str, object]:
    """The document, of OpenAPI 3.1.

    Args:
        has_keys: whether the server asks for keys.
    """
    paths: dict[str, dict[str, object]] = {}
    for one in _OPERATIONS:
        path = one.path.replace(":path}", "}")
        paths.setdefault(path, {})[one.method] = _operation(one, has_keys)
        if "{" in path:
            paths[path]["parameters"] = [_NAME]
    components: dict[str, object] = {
        "schemas": openapi_requests.SCHEMAS
        | openapi_answers.SCHEMAS
        | {"Document": {"type": "object", "required": ["openapi", "info", "paths"]}},
        "headers": _HEADERS,
    }
    document: dict[str, object] = {
        "openapi": "3.1.0",
        "info": {"title": "llama-run serve", "version": __version__, "description": _ABOUT},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": components,
    }
    if has_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


_NAME: Schema = {
    "name": "name",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "minLength": 1},
    "description": "It may hold slashes.",
}
_HEADERS: dict[str, Schema] = {
    "X-Request-Id": {
        "schema": {"type": "string"},
        "description": "The name that the request came with, or a fresh one.",
    },
    "Retry-After": {
        "required": True,
        "schema": {"type": "integer", "minimum": int(RETRY_SECONDS)},
        "description": "Seconds.",
    },
    "WWW-Authenticate": {"required": True, "schema": {"const": "Bearer"}},
}


def _operation(one: Operation, has_keys: bool) -> dict[str, object]:
    content: dict[str, object] = {
        one.kind: {"schema": {"type": "string"} if one.answer is None else ref(one.answer)}
    }
    if one.chunk is not None:
        content["text/event-stream"] = {"schema": _stream(one.chunk)}
    headers = {"X-Request-Id": _header("X-Request-Id")}
    answered = {"description": "Answered.", "headers": headers, "content": content}
    responses: dict[str, object] = {"200": answered}
    for status in sorted({*_EVERYWHERE, *one.statuses, *_refusals(one, has_keys)}):
        responses[str(status)] = _failed(status)
    found: dict[str, object] = {"summary": one.summary, "responses": responses}
    if one.body is not None:
        content = {_JSON: {"schema": ref(one.body)}}
        found["requestBody"] = {"required": True, "content": content}
    if has_keys and one.path in OPEN_PATHS:
        found["security"] = []
    return found


def _stream(chunk: str) -> Schema:
    """The schema of each event."""
    said: Schema = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [ref(chunk), ref("Error")]},
    }
    return {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, said]}},
        "required": ["data"],
        "description": (
            f"Where stream is true: events whose data are {chunk} objects, and [DONE] as the last "
            "one; or an Error as the last one. Lines that begin with a colon are to be ignored."
        ),
    }


def _refusals(one: Operation, has_keys: bool) -> Iterator[int]:
    """The statuses of what stands before the routes."""
    if has_keys and one.path not in OPEN_PATHS:
        yield 401
    if not has_keys and one.method == "post":
        yield 403


def _failed(status: int) -> dict[str, object]:
    found: dict[str, object] = {
        "description": _SENTENCES[status],
        "content": {_JSON: {"schema": ref("Error")}},
    }
    name = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}.get(status)
    return found if name is None else found | {"headers": {name: _header(name)}}


def _header(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/headers/{name}"}
