"""The page at ``/``: its files, and the numbers that they show."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llama_runtime.server.page_files import FILES, INDEX, STATE_PATH, locked, media_type, read
from llama_runtime.server.page_state import page_state
from llama_runtime.server.service import Service
from llama_runtime.server.shell import JsonResponse

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def page_routes(service: Service) -> list[Route]:
    """The routes of the page.

    Args:
        service: what all routes share.
    """

    async def state(_request: Request) -> JsonResponse:
        return JsonResponse(page_state(service), headers={"Cache-Control": "no-store"})

    has_keys = bool(service.settings.api_keys)
    found = [Route(path, _file(name, has_keys)) for path, name in FILES.items()]
    return [*found, Route(STATE_PATH, state)]


def _file(name: str, has_keys: bool) -> Callable[[Request], Awaitable[Response]]:
    data = read(name)
    if name == INDEX and has_keys:
        data = locked(data)

    async def answer(_request: Request) -> Response:
        return Response(data, headers=HEADERS, media_type=media_type(name))

    return answer
