"""Run a bundle: many sequences of different lengths in one compiled Llama graph, without torch.

    from llama_runtime import LLM

    with LLM("bundle") as llm:
        print(llm.generate("Gravity is")[0].text)

The names of ``__all__`` are the public interface. Each is imported when it is first asked for, so
that importing the package costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's own takes longer to import than the commands take to be ready
if TYPE_CHECKING:
    from llama_runtime.async_llm import AsyncLLM
    from llama_runtime.async_stream import AsyncStream
    from llama_runtime.bundle import open_bundle
    from llama_runtime.completion import Completion, Request
    from llama_runtime.engine import Engine
    from llama_runtime.errors import (
        BackendError,
        BundleError,
        CapacityError,
        CaravanError,
        DeadlineError,
        DependencyError,
        QueueFullError,
        RequestError,
    )
    from llama_runtime.events import BatchDecision, TokenEvent
    from llama_runtime.llm import LLM
    from llama_runtime.loading import Loaded, load
    from llama_runtime.memory_plan import MemoryPlan
    from llama_runtime.params import SamplingParams
    from llama_runtime.sequence import TokenLogprob
    from llama_runtime.settings import Settings
    from llama_runtime.shared_engine import Stats

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncStream",
    "BackendError",
    "BatchDecision",
    "BundleError",
    "CapacityError",
    "CaravanError",
    "Completion",
    "DeadlineError",
    "DependencyError",
    "Engine",
    "Loaded",
    "MemoryPlan",
    "QueueFullError",
    "Request",
    "RequestError",
    "SamplingParams",
    "Settings",
    "Stats",
    "TokenEvent",
    "TokenLogprob",
    "__version__",
    "load",
    "open_bundle",
]

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "AsyncStream": "async_stream",
    "BatchDecision": "events",
    "BackendError": "errors",
    "BundleError": "errors",
    "CapacityError": "errors",
    "CaravanError": "errors",
    "Completion": "completion",
    "DeadlineError": "errors",
    "DependencyError": "errors",
    "Engine": "engine",
    "Loaded": "loading",
    "MemoryPlan": "memory_plan",
    "QueueFullError": "errors",
    "Request": "completion",
    "RequestError": "errors",
    "SamplingParams": "params",
    "Settings": "settings",
    "Stats": "shared_engine",
    "TokenEvent": "events",
    "TokenLogprob": "sequence",
    "load": "loading",
    "open_bundle": "bundle",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
