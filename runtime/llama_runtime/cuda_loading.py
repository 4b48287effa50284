"""From a bundle to engines on CUDA devices: one each, and one queue for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from itertools import count

from llama_runtime.backends.cuda_device import Device
from llama_runtime.batch_sizer import BatchSizer
from llama_runtime.bundle import Bundle
from llama_runtime.contract import PAGED, DType
from llama_runtime.cuda_engine import cuda_engine
from llama_runtime.cuda_plan import MARGIN, CudaPlan, block_size_of
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.engine_group import EngineGroup
from llama_runtime.errors import BundleError
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.machine import Memory
from llama_runtime.memory_plan import weight_bytes

CUDA_MAX_BATCH = 128  # unless told
CUDA_AUTO_MAX_BATCH = 256  # if the size is to be found
CUDA_PROMPT_BUDGET = 2048  # prompt tokens of one step
_DTYPES: dict[str, tuple[DType, DType]] = {  # of activations, and of keys and values
    "fp16": ("float16", "float16"),
    "bf16": ("bfloat16", "bfloat16"),
    "int4": ("float16", "float16"),
    "fp16+fp8kv": ("float16", "float8e4m3fn"),
    "bf16+fp8kv": ("bfloat16", "float8e4m3fn"),
    "int4+fp8kv": ("float16", "float8e4m3fn"),
}


@contextmanager
def opened_devices(ordinals: Seq[int]) -> Iterator[list[Device]]:
    """Devices, which are closed again if what follows fails.

    Raises:
        DependencyError: the bindings aren't installed.
        BackendError: there is no such device, or its driver is too old.
    """
    devices: list[Device] = []
    try:
        for ordinal in ordinals:
            devices.append(Device(ordinal))  # noqa: PERF401  those before one that fails are closed
        yield devices
    except BaseException:
        for device in devices:
            device.close()
        raise


def cuda_plan(bundle: Bundle, devices: Seq[Device], max_batch: int, max_len: int) -> CudaPlan:
    """What a setting needs of the device that has the least left.

    Raises:
        BundleError: there is no graph for CUDA, or it is of a precision that this version doesn't
            know.
    """
    geometry = bundle.manifest.geometry
    bundle.graph_path(PAGED.name)  # which it may not have
    cache_dtype = cuda_cache_dtype(bundle)
    memories = [
        Memory(int(free - MARGIN * total), f"GPU {device.ordinal}, {device.name}")
        for device in devices
        for free, total in [device.memory()]
    ]
    return CudaPlan(
        geometry=geometry,
        weights=weight_bytes(bundle.manifest, PAGED.name),
        available=min(memories, key=lambda memory: memory.num_bytes),
        max_batch=max_batch,
        max_len=max_len,
        prompt_budget=CUDA_PROMPT_BUDGET,
        block_size=block_size_of(geometry.head_dim),
        cache_dtype=cache_dtype,
    )


def cuda_engines(
    bundle: Bundle,
    devices: Seq[Device],
    plan: CudaPlan,
    token_bytes: TokenBytes,
    eos_token_ids: Collection[int],
    *,
    share_prefixes: bool = True,
    stream_budget: int | None = None,
    find_batch: bool = False,
    grammars: GrammarCompiler | None = None,
) -> Engine | EngineGroup:
    """An engine on each device, which it owns from now on; several behind one queue.

    With ``share_prefixes`` false no prompt is spared what another one computed. With ``find_batch``
    each finds by itself how many of its slots to use. For ``grammars`` see ``Engine``.

    Raises:
        BundleError: the graph is of a precision that this version doesn't know.
        DependencyError: onnxruntime has no CUDA provider.
        BackendError: the graph can't be loaded.
    """
    manifest = bundle.manifest
    dtype, cache_dtype = _dtypes(bundle)
    ids = count()
    engines: list[Engine] = []
    try:
        for device in devices:
            engine = cuda_engine(
                bundle.graph_path(PAGED.name),
                manifest.geometry,
                device,
                token_bytes,
                eos_token_ids,
                dtype=dtype,
                cache_dtype=cache_dtype,
                max_batch=plan.max_batch,
                max_len=plan.max_len,
                num_blocks=plan.num_blocks,
                block_size=plan.block_size,
                prompt_budget=plan.prompt_budget,
                share_prefixes=share_prefixes,
                stream_budget=stream_budget,
                ids=ids,
                grammars=grammars,
                batch_sizer=BatchSizer(plan.max_batch) if find_batch else None,
            )
            engines.append(engine)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return engines[0] if len(engines) == 1 else EngineGroup(engines)


def cuda_cache_dtype(bundle: Bundle) -> DType:
    """The type of keys and values.

    Raises:
        BundleError: the graph is of a precision that this version doesn't know.
    """
    return _dtypes(bundle)[1]


def _dtypes(bundle: Bundle) -> tuple[DType, DType]:
    """The types of activations, and of keys and values."""
    (precision,) = (g.precision for g in bundle.manifest.graphs if g.dialect == PAGED.name)
    if precision not in _DTYPES:
        raise BundleError(
            f"{bundle.path} has a graph of precision {precision!r}, and this Caravan runs "
            f"{', '.join(_DTYPES)}: upgrade it, or rebuild the bundle with llama-export build"
        )
    return _DTYPES[precision]
