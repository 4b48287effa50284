"""OpenAI's API over HTTP, for a model that is loaded: an application to serve or to mount.

    app = create_app(llm, ServerSettings(api_keys=("...",)))

The application installs no signal handlers and keeps nothing outside itself, so that it can be a
part of another service; ``llama-run serve`` is one that is nothing else.
"""

from llama_runtime.errors import DependencyError

INSTALL = "pip install 'llama-caravan[serve]'"

try:
    from llama_runtime.server.app import create_app
    from llama_runtime.server.service import Service
    from llama_runtime.server.settings import ServerSettings
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("starlette", "prometheus_client"):
        raise
    raise DependencyError(
        f"the server needs starlette, uvicorn and prometheus-client ({error}): {INSTALL}"
    ) from error

__all__ = ["INSTALL", "ServerSettings", "Service", "create_app"]
