"""Build an engine from a bundle's graph.

TensorRT-RTX builds for GPUs that it doesn't see, in seconds, and finishes the work on the user's
GPU when the engine is first run. TensorRT builds for the GPU it runs on, and times kernels there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_runtime.contract import DType, Geometry
from llama_runtime.errors import BackendError, CapacityError, DependencyError, one_line
from llama_runtime.machine import available_memory
from llama_runtime.tensorrt.library import (
    CURRENT,
    INSTALL,
    Library,
    Messages,
    messages,
    process_logger,
)
from llama_runtime.tensorrt.limits import EngineLimits
from llama_runtime.tensorrt.network import check_network, parse_network
from llama_runtime.tensorrt.progress import PhaseTree

WEIGHTS = "model.safetensors"  # beside the graph

# Memory that a build takes: so much whatever the model, so much a layer, and so many times the
# weights. Peaks of RssAnon with TensorRT-RTX 1.7.1, for one target or four, in a fresh process:
#   layers  weights   peak
#        2  0.00 GB   0.13 GB  float16, bfloat16
#        2  0.55 GB   1.24 GB  float16
#        8  0.37 GB   0.95 GB  float16
#       12  1.72 GB   3.67 GB  float16, bfloat16
#       30  0.27 GB   0.94 GB  float16
#       30  0.12 GB   0.75 GB  int4
#       22  0.81 GB   2.80 GB  int4
# The mapped weights come on top, as pages that the system can drop.
MEMORY_BASE = 200_000_000
MEMORY_OF_LAYER = 12_000_000
MEMORY_FACTOR = 2.25
MEMORY_FACTOR_INT4 = 3.25

_REDRAW_SECONDS = 0.1
_SHOWN_ERRORS = 3


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine, not loaded yet.

    Attributes:
        plan: what TensorRT deserialises, weights included.
        log: all that TensorRT said, a line a message.
        seconds: how long it took.
        timing_cache: what makes the next build of a similar graph faster; empty if there is none.
    """

    plan: memoryview
    log: str
    seconds: float
    timing_cache: bytes = b""


def build_engine(
    graph: Path,
    geometry: Geometry,
    limits: EngineLimits,
    *,
    precision: DType,
    targets: Sequence[str],
    library: Library,
    timing_cache: bytes = b"",
    on_progress: Callable[[float], None] | None = None,
) -> BuiltEngine:
    """Build an engine with a profile for decoding and one for prompts.

    Args:
        graph: the bundle's ONNX file, checked already, its weights beside it.
        geometry: the model's.
        limits: sizes of the engine.
        precision: type of the graph's activations and caches.
        targets: of ``parse_targets``.
        library: what builds it.
        timing_cache: of an earlier build by TensorRT, if there is one.
        on_progress: called in this thread, a few times a second, with a fraction that never falls.
            What it raises cancels the build and comes out of here, as does an interrupt meanwhile.

    Raises:
        CapacityError: there isn't the memory to build it.
        BackendError: TensorRT can't parse or build the graph, or the network isn't the one that
            was meant.
    """
    check_memory(graph, geometry.num_layers)
    start = time.perf_counter()
    with messages() as said:
        builder = library.module.Builder(process_logger(library))
        network = parse_network(library, process_logger(library), builder, graph, limits)
        check_network(library, network.definition, geometry, limits, precision)
        config = _config(library, builder, geometry, limits, targets, timing_cache)
        phases = PhaseTree()

        def build() -> Any:
            monitor = _monitor(library, phases)  # held here: TensorRT only points to it
            config.progress_monitor = monitor
            return builder.build_serialized_network(network.definition, config)

        report = on_progress or (lambda _: None)
        plan = _in_a_thread(build, phases, report, _device(targets))
    if plan is None:
        raise BackendError(f"{library.name} can't build {graph}: {_last_errors(said)}")
    seconds = time.perf_counter() - start
    timed = b"" if library.builds_ahead else bytes(config.get_timing_cache().serialize())
    return BuiltEngine(memoryview(plan).cast("B"), said.text, seconds, timed)


def check_memory(graph: Path, num_layers: int) -> None:
    """Refuse a build for which there isn't the memory: the system would end the process.

    Args:
        graph: an ONNX file, its weights beside it.
        num_layers: the model's.

    Raises:
        CapacityError: memory is too small; the message has the numbers.
    """
    files = [path for path in (graph, graph.with_name(WEIGHTS)) if path.is_file()]
    weights = sum(path.stat().st_size for path in files)
    is_int4 = graph in files and b"DequantizeLinear" in graph.read_bytes()
    factor = MEMORY_FACTOR_INT4 if is_int4 else MEMORY_FACTOR
    needed = MEMORY_BASE + num_layers * MEMORY_OF_LAYER + round(factor * weights)
    memory = available_memory(mapped_bytes=weights)
    if needed > memory.num_bytes:
        raise CapacityError(
            f"building an engine with {weights / 1e9:.2f} GB of weights takes about "
            f"{needed / 1e9:.1f} GB of memory, and {memory.bound} has {memory.num_bytes / 1e9:.1f} "
            "GB free: build it on a larger machine",
            param="memory",
        )


def _config(
    library: Library,
    builder: Any,
    geometry: Geometry,
    limits: EngineLimits,
    targets: Sequence[str],
    timing_cache: bytes,
) -> Any:
    """Profiles and targets of a build."""
    config = builder.create_builder_config()
    for index, shapes in enumerate(limits.profiles(geometry)):
        profile = builder.create_optimization_profile()
        for name, (least, usual, largest) in shapes.items():
            profile.set_shape(name, least, usual, largest)
        if config.add_optimization_profile(profile) != index:
            raise BackendError(f"{library.name} refuses the sizes of {limits}")
    if library.builds_ahead:  # and times nothing, so it has no use for a timing cache
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = library.module.ComputeCapability.__members__[target.upper()]
            config.set_compute_capability(capability, index)
    else:
        # One of another version or GPU is refused, and then the build begins with an empty one.
        if not config.set_timing_cache(config.create_timing_cache(timing_cache), False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
    return config


def _monitor(library: Library, phases: PhaseTree) -> Any:
    """What TensorRT tells of its progress to; nothing in it can fail."""
    base: Any = library.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            phases.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            phases.step(name, step)
            return not phases.cancelled

        def phase_finish(self, name: str) -> None:
            phases.finish(name)

    return Monitor()


def _in_a_thread(
    build: Callable[[], Any],
    phases: PhaseTree,
    on_progress: Callable[[float], None],
    device: int | None,
) -> Any:
    """Build in another thread, and report from this one.

    Python raises an interrupt wherever it next runs in the main thread. If TensorRT ran there that
    would be in a method of the monitor, and exceptions can't pass through C++. So this thread
    waits, takes what comes, and asks TensorRT to end at its next step.
    """
    result: list[Any] = []
    failures: list[Exception] = []
    # Not Thread.join: interrupted, that of Python 3.11 takes the thread for ended.
    done = threading.Event()

    def work() -> None:
        try:
            if device is not None:
                _cuda("cudaSetDevice", device)
            result.append(build())
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=work, name="tensorrt-build")
    thread.start()
    try:
        while not done.wait(_REDRAW_SECONDS):
            on_progress(phases.fraction)
    except BaseException:
        phases.cancelled = True
        done.wait()
        raise
    if failures:
        raise failures[0]
    if result[0] is not None:
        on_progress(1.0)
    return result[0]


def _device(targets: Sequence[str]) -> int | None:
    """The device of this thread, which another has to be told, if an engine is built for it."""
    return int(_cuda("cudaGetDevice")) if CURRENT in targets else None


def _cuda(name: str, *arguments: Any) -> Any:
    """A function of CUDA's runtime, its status checked."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise DependencyError(f"the GPU needs cuda-bindings ({error}): {INSTALL}") from error
    try:
        status, *values = getattr(runtime, name)(*arguments)
    except RuntimeError as missing:  # the driver's library itself
        raise BackendError(f"there is no CUDA driver on this machine: {missing}") from missing
    if int(status):
        raise BackendError(f"an engine for the GPU of this machine needs one: {status.name}")
    return values[0] if values else None


def _last_errors(said: Messages) -> str:
    """The last that went wrong."""
    return one_line("; ".join(said.errors[-_SHOWN_ERRORS:])) or "it doesn't say why"
