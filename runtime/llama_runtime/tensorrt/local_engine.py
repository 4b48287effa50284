"""The engine of a bundle on this machine: the one that is kept, or a new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llama_runtime.bundle import Bundle
from llama_runtime.contract import TENSORRT, DType
from llama_runtime.errors import BundleError
from llama_runtime.graph_file import TENSORRT_OPERATORS, check_graph
from llama_runtime.tensorrt import engine_cache
from llama_runtime.tensorrt.engine_build import WEIGHTS, build_engine
from llama_runtime.tensorrt.engine_cache import EngineKey
from llama_runtime.tensorrt.kept import load_kept, store_kept
from llama_runtime.tensorrt.library import Library
from llama_runtime.tensorrt.limits import EngineLimits

_DTYPES: dict[str, DType] = {"fp16": "float16", "bf16": "bfloat16", "int4": "float16"}


def activations(bundle: Bundle) -> DType:
    """The type of activations, keys and values of a bundle's graph for TensorRT.

    Raises:
        BundleError: it has none, or of a precision that this version doesn't know.
    """
    bundle.graph_path(TENSORRT.name)  # which it may not have
    (name,) = (g.precision for g in bundle.manifest.graphs if g.dialect == TENSORRT.name)
    if name not in _DTYPES:
        raise BundleError(
            f"{bundle.path} has a graph of precision {name!r}, and this Caravan runs "
            f"{', '.join(_DTYPES)}: upgrade it, or rebuild the bundle with llama-export build"
        )
    return _DTYPES[name]


def engine_key(
    bundle: Bundle, library: Library, target: str, limits: EngineLimits, *, device: str = ""
) -> EngineKey:
    """What an engine of a bundle is kept under.

    Args:
        bundle: its graph and weights count by the hashes of its manifest.
        library: what builds it.
        target: one of the library's.
        limits: sizes of the engine.
        device: the GPU, where ``target`` is the current one.
    """
    files, graph = bundle.manifest.files, bundle.graph_path(TENSORRT.name).name
    (precision,) = (g.precision for g in bundle.manifest.graphs if g.dialect == TENSORRT.name)
    return EngineKey.of(
        files[graph].sha256,
        files[WEIGHTS].sha256,
        library,
        (target,),
        precision,
        limits,
        device=device,
    )


def local_engine(
    bundle: Bundle,
    library: Library,
    target: str,
    limits: EngineLimits,
    *,
    device: str = "",
    rebuild: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[memoryview, Path | None]:
    """The plan of an engine that was built here, now or earlier.

    Args:
        bundle: its files have been checked.
        library: what builds it.
        target: one of the library's.
        limits: sizes of the engine.
        device: the GPU, where ``target`` is the current one.
        rebuild: whether one that is kept is built again.
        on_progress: see ``build_engine``; not called where nothing is built.

    Returns:
        The plan, and the folder it is kept in, if it can be.

    Raises:
        BundleError: the bundle has no graph for TensorRT.
        BackendError: the graph is refused, or can't be built.
        CapacityError: there isn't the memory to build it.
    """
    key = engine_key(bundle, library, target, limits, device=device)
    plan = None if rebuild else engine_cache.load(key)
    if plan is not None:
        return plan, engine_cache.engine_folder(key)
    dtype, graph = activations(bundle), bundle.graph_path(TENSORRT.name)
    check_graph(graph, TENSORRT_OPERATORS)
    built = build_engine(
        graph,
        bundle.manifest.geometry,
        limits,
        precision=dtype,
        targets=(target,),
        library=library,
        timing_cache=load_kept("timing", library, device),
        on_progress=on_progress,
    )
    store_kept("timing", library, device, built.timing_cache)
    return built.plan, engine_cache.store(key, built)
