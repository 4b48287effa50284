"""The application: its routes, and what stands before them."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.openai_api import parse_chat, parse_completion
from llama_runtime.server.answers import Answers
from llama_runtime.server.info_routes import InfoRoutes
from llama_runtime.server.metrics_route import MetricsRoute
from llama_runtime.server.openapi import PATH, OpenApiRoute
from llama_runtime.server.page_routes import page_routes
from llama_runtime.server.service import Service
from llama_runtime.server.settings import ServerSettings
from llama_runtime.server.shell import Shell, http_error
from llama_runtime.server.text_routes import TextRoute, detokenize, tokenize


def create_app(llm: AsyncLLM, settings: ServerSettings | None = None) -> Starlette:
    """OpenAI's API for a model that is loaded, to serve or to mount in another application.

    Args:
        llm: the model. It stays its owner's, who closes it after the application has ended.
        settings: how to answer; None takes the defaults.

    Returns:
        An ASGI application. Its ``state.service`` is the ``Service``, whose ``refuse`` and
        ``settled`` drain it.
    """
    return app_of(Service(settings or ServerSettings(), llm))


def app_of(service: Service) -> Starlette:
    """The application of a service, which may still be loading.

    Args:
        service: what the routes share.
    """
    app = Starlette(
        routes=_routes(service),
        middleware=[Middleware(Shell, service)],
        exception_handlers={HTTPException: http_error},
    )
    app.router.redirect_slashes = False  # what isn't there is an error like any other
    app.state.service = service
    return app


def _routes(service: Service) -> list[Route]:
    info = InfoRoutes(service)
    chat = Answers(service, parse_chat, "chatcmpl")
    completion = Answers(service, parse_completion, "cmpl")
    return [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", completion, methods=["POST"]),
        Route("/v1/models", info.models),
        Route("/v1/models/{name:path}", info.model),
        Route("/tokenize", TextRoute(service, tokenize), methods=["POST"]),
        Route("/detokenize", TextRoute(service, detokenize), methods=["POST"]),
        Route("/version", info.version),
        Route("/metrics", MetricsRoute(service).answer),
        Route(PATH, OpenApiRoute(service).answer),
        Route("/health", info.health),
        Route("/ping", info.health),
        Route("/ready", info.ready),
        *page_routes(service),
    ]
