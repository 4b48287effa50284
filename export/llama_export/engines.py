"""TensorRT engines of a bundle, built when the bundle is: for GPUs that needn't be here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_export.stages import Advance, Stages
from llama_runtime.backends.cuda_device import Device
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.errors import CaravanError, RequestError
from llama_runtime.memory_plan import MAX_BATCH, MIN_LEN
from llama_runtime.settings import DEFAULT_MAX_BATCH, DEFAULT_MAX_LEN, in_range
from llama_runtime.tensorrt.engine_cache import sign_off
from llama_runtime.tensorrt.library import CURRENT, Library, import_tensorrt, parse_targets
from llama_runtime.tensorrt.limits import EngineLimits
from llama_runtime.tensorrt.local_engine import engine_key, local_engine
from llama_runtime.tensorrt_loading import target_of

PERCENT = 100


@dataclass(frozen=True, slots=True)
class Wanted:
    """Engines to build.

    Attributes:
        library: what builds them.
        targets: of the library, one engine each.
        max_batch: sequences at once.
        max_len: tokens of one sequence; None is the usual number, as far as the model goes.
        device: the GPU, if it is built for the one that is here.
    """

    library: Library
    targets: Sequence[str]
    max_batch: int
    max_len: int | None
    device: str = ""


def wanted_engines(
    targets: str | None, max_batch: int | None, max_len: int | None
) -> Wanted | None:
    """What to build, known before anything is.

    Args:
        targets: names of GPUs with commas between, or ``current``; None is the GPU that is here.
        max_batch: sequences at once; None is the runtime's default.
        max_len: tokens of one sequence; None likewise.

    Returns:
        None if ``targets`` is, and this machine has no library or no GPU to build for.

    Raises:
        DependencyError: targets are named, and no library is installed.
        RequestError: the library doesn't build for one of them, or a size is out of range.
        BackendError: it is to be the current GPU, and there is none that the library runs on.
    """
    batch = in_range("max_batch", DEFAULT_MAX_BATCH if max_batch is None else max_batch, MAX_BATCH)
    try:
        library = import_tensorrt()
        names = (CURRENT,) if targets is None else parse_targets(targets, library)
        device = ""
        if CURRENT in names:
            gpu = Device()
            names = (target_of(gpu, library),)
            device = "{}, {}.{}".format(gpu.name, *gpu.capability) if CURRENT in names else ""
            gpu.close()
    except RequestError:
        raise
    except CaravanError:
        if targets is None:
            return None
        raise
    return Wanted(library, names, batch, max_len, device)


def build_engines(path: Path, wanted: Wanted, stages: Stages) -> list[str]:
    """Build the engines of a bundle, unless they are there.

    Args:
        path: the bundle.
        wanted: of ``wanted_engines``.
        stages: where progress goes.

    Returns:
        A line about each.

    Raises:
        RequestError: the model doesn't take so long sequences.
        BackendError: TensorRT refuses the graph; or what it parsed isn't what was meant.
        CapacityError: there isn't the memory.
    """
    bundle = open_bundle(path, verify="size")
    limits = _limits(bundle, wanted)
    lines = []
    for target in wanted.targets:
        with stages(f"build for {target}", PERCENT) as advance:
            plan, folder = local_engine(
                bundle,
                wanted.library,
                target,
                limits,
                device=wanted.device,
                on_progress=_in_percent(advance),
            )
        where = "not kept" if folder is None else str(folder)
        lines.append(
            f"engine for {target}: {plan.nbytes / 1e6:,.0f} MB, {wanted.library.name} "
            f"{wanted.library.version}, max_batch {limits.max_batch}, max_len {limits.max_len}; "
            f"{where}"
        )
    return lines


def adopt_engine(path: Path, plan: Path, wanted: Wanted) -> str:
    """Keep an engine from elsewhere as this user's own, for a bundle.

    Args:
        path: the bundle.
        plan: the engine's file.
        wanted: what it was built for: one target.

    Raises:
        RequestError: there are several targets.
        BackendError: the file can't be read.
    """
    if len(wanted.targets) != 1:
        raise RequestError("an engine is for one GPU: name it with --for", param="for")
    bundle = open_bundle(path, verify="size")
    limits = _limits(bundle, wanted)
    (target,) = wanted.targets
    key = engine_key(bundle, wanted.library, target, limits, device=wanted.device)
    folder = sign_off(plan, key)
    return f"engine for {target} taken from {plan}; {folder or 'not kept'}"


def _in_percent(advance: Advance) -> Callable[[float], None]:
    return lambda part: advance(int(part * PERCENT))


def _limits(bundle: Bundle, wanted: Wanted) -> EngineLimits:
    longest = bundle.manifest.geometry.max_positions
    length = min(DEFAULT_MAX_LEN, longest) if wanted.max_len is None else wanted.max_len
    return EngineLimits(wanted.max_batch, in_range("max_len", length, longest, low=MIN_LEN))
