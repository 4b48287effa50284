"""From a bundle to a TensorRT engine on a CUDA device, which is built if it isn't there."""

from __future__ import annotations

import logging
from collections.abc import Collection

from llama_runtime.backends.cuda_device import Device
from llama_runtime.bundle import Bundle
from llama_runtime.contract import TENSORRT
from llama_runtime.cuda_plan import MARGIN
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.machine import Memory
from llama_runtime.memory_plan import weight_bytes
from llama_runtime.tensorrt.library import CURRENT, Library, import_tensorrt
from llama_runtime.tensorrt.local_engine import activations, local_engine
from llama_runtime.tensorrt_engine import tensorrt_engine
from llama_runtime.tensorrt_plan import TensorRtPlan

logger = logging.getLogger(__name__)


def tensorrt_plan(bundle: Bundle, device: Device, max_batch: int, max_len: int) -> TensorRtPlan:
    """What a setting needs of a device.

    Raises:
        BundleError: there is no graph for TensorRT, or it is of a precision that this version
            doesn't know.
    """
    dtype = activations(bundle)
    free, total = device.memory()
    return TensorRtPlan(
        geometry=bundle.manifest.geometry,
        weights=weight_bytes(bundle.manifest, TENSORRT.name),
        available=Memory(int(free - MARGIN * total), f"GPU {device.ordinal}, {device.name}"),
        max_batch=max_batch,
        max_len=max_len,
        prompt_budget=0,  # an engine's own limit
        cache_dtype=dtype,
    )


def loaded_engine(
    bundle: Bundle,
    device: Device,
    plan: TensorRtPlan,
    token_bytes: TokenBytes,
    eos_token_ids: Collection[int],
    grammars: GrammarCompiler | None = None,
) -> Engine:
    """An engine on a device, which it owns from now on; for ``grammars`` see ``Engine``.

    Raises:
        BundleError: the bundle has no graph for TensorRT.
        DependencyError: TensorRT isn't installed.
        BackendError: the library doesn't run on this GPU, or an engine can't be built or loaded.
        CapacityError: there isn't the memory to build one.
    """
    library = import_tensorrt()
    target = target_of(device, library)
    logger.info("the engine for %s is looked for, and built if there is none", device.name)
    about = f"{device.name}, {device.capability[0]}.{device.capability[1]}"
    serialised, _ = local_engine(
        bundle, library, target, plan.limits, device=about if target == CURRENT else ""
    )
    return tensorrt_engine(
        library,
        serialised,
        bundle.manifest.geometry,
        plan.limits,
        device,
        token_bytes,
        eos_token_ids,
        dtype=activations(bundle),
        grammars=grammars,
    )


def target_of(device: Device, library: Library) -> str:
    """What an engine for a device is built for.

    Raises:
        BackendError: the library has nothing for it.
    """
    if not library.builds_ahead:
        return CURRENT
    target = "sm{}{}".format(*device.capability)
    if target not in library.targets():
        names = ", ".join(name for name in library.targets() if name != CURRENT)
        raise BackendError(
            f"{library.name} {library.version} doesn't run on {device.name} ({target}), only on "
            f"{names}: install TensorRT, or build the bundle with llama-export build --target cuda"
        )
    return target
