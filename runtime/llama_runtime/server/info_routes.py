"""The routes that say what is here and how it is."""

from __future__ import annotations

from starlette.requests import Request

from llama_runtime import __version__
from llama_runtime.server.service import Service
from llama_runtime.server.shell import JsonResponse, error_response


class InfoRoutes:
    """What these routes answer with. None of them waits for the engine.

    Args:
        service: what all routes share.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, _request: Request) -> JsonResponse:
        """``/health`` and ``/ping``: whether this process is worth keeping.

        It is while it loads and while it drains.
        """
        broken = self._service.broken
        return JsonResponse({"status": "ok"}) if broken is None else error_response(broken)

    async def ready(self, _request: Request) -> JsonResponse:
        """``/ready``: whether requests are taken now."""
        refusal = self._service.refusal
        return JsonResponse({"status": "ready"}) if refusal is None else error_response(refusal)

    async def version(self, _request: Request) -> JsonResponse:
        """``/version``: that of this program."""
        return JsonResponse({"version": __version__})

    async def models(self, _request: Request) -> JsonResponse:
        """``/v1/models``: the names of the model."""
        max_len = self._service.llm.max_len
        data = [self._model(name, max_len) for name in self._service.names]
        return JsonResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> JsonResponse:
        """``/v1/models/{id}``: one of them."""
        max_len = self._service.llm.max_len
        name = request.path_params["name"]
        self._service.check_model(name)
        return JsonResponse(self._model(name, max_len))

    def _model(self, name: str, max_len: int) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._service.created,
            "owned_by": "caravan",
            "max_model_len": max_len,
        }
