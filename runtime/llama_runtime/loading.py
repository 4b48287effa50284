"""From a bundle to an engine that is ready: checks, memory plan, graph, cache."""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.contract import (
    PAGED,
    PROMPT_CHUNK,
    SAMPLER,
    SLOTS,
    TENSORRT,
    cache_capacity,
)
from llama_runtime.engine import Engine
from llama_runtime.engine_group import EngineGroup
from llama_runtime.errors import RequestError
from llama_runtime.generation_config import default_params, eos_token_ids
from llama_runtime.machine import available_memory, default_threads
from llama_runtime.memory_plan import MAX_BATCH, MIN_LEN, MemoryPlan, weight_bytes
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.slots_engine import slots_engine

if TYPE_CHECKING:
    from llama_runtime.backends.cuda_device import Device
    from llama_runtime.cuda_plan import CudaPlan
    from llama_runtime.tensorrt_plan import TensorRtPlan

DEFAULT_MAX_BATCH = 32
DEFAULT_MAX_LEN = 4096
LEAST_DEFAULT_LEN = 512  # less is not chosen for anybody: max_tokens alone is 256 by default
PROMPT_BUDGET = 256  # prompt tokens of one step


@dataclass(frozen=True, slots=True)
class Loaded:
    """What ``load`` made of a bundle.

    Attributes:
        encoder: its text side.
        memory_plan: what it may take of memory, which is there.
        threads: of the kernels; None on CUDA.
        default_params: sampling where the caller asks for none.
        engine: ready to run.
    """

    encoder: PromptEncoder
    memory_plan: MemoryPlan
    threads: int | None
    default_params: SamplingParams
    engine: Engine | EngineGroup


def load(
    bundle: str | os.PathLike[str] | PromptEncoder,
    *,
    max_batch: int | None,
    max_len: int | None,
    threads: int | None,
    devices: Seq[int] | None,
    verify: Literal["full", "size"] | None,
) -> Loaded:
    """Load a bundle; arguments and errors are those of ``LLM``."""
    encoder = opened(bundle, verify=verify)
    config = encoder.bundle.generation_config
    params, eos = default_params(config), eos_token_ids(config)
    if runs_on_gpu(encoder.bundle):
        _refuse_threads(encoder.bundle, threads)
        load_it = _load_tensorrt if runs_on_tensorrt(encoder.bundle) else _load_paged
        return load_it(encoder, max_batch, max_len, devices, params, eos)
    wanted = _plan_slots(encoder.bundle, max_batch, max_len, devices)
    threads = in_range("threads", default_threads() if threads is None else threads, 1024)
    wanted.check()
    manifest = encoder.bundle.manifest
    kernels = OrtSampler(encoder.bundle.graph_path(SAMPLER), manifest.geometry.vocab_size, threads)
    backend = OrtCpu(
        open_session(encoder.bundle.graph_path(SLOTS.name), threads),
        manifest.geometry,
        num_slots=wanted.max_batch,
        capacity=cache_capacity(wanted.max_len, PROMPT_CHUNK),
    )
    engine = slots_engine(
        backend,
        encoder.tokenizer.byte_table,
        eos,
        vocab_size=manifest.geometry.vocab_size,
        max_batch=wanted.max_batch,
        max_len=wanted.max_len,
        prompt_budget=PROMPT_BUDGET,
        max_chunk=PROMPT_CHUNK,
        kernels=kernels,
    )
    return Loaded(encoder, wanted, threads, params, engine)


def opened(
    bundle: str | os.PathLike[str] | PromptEncoder, *, verify: Literal["full", "size"] | None
) -> PromptEncoder:
    """The text side of a bundle, opened unless it is already."""
    if isinstance(bundle, PromptEncoder):
        return bundle
    if not isinstance(bundle, (str, os.PathLike)):
        raise RequestError(f"bundle must be a path, not {type(bundle).__name__}", param="bundle")
    return PromptEncoder(open_bundle(Path(bundle), verify=verify))


def runs_on_gpu(bundle: Bundle) -> bool:
    """Whether a bundle was built for CUDA devices, and not for the CPU."""
    dialects = {graph.dialect for graph in bundle.manifest.graphs}
    return not dialects.isdisjoint({PAGED.name, TENSORRT.name}) and SLOTS.name not in dialects


def runs_on_tensorrt(bundle: Bundle) -> bool:
    """Whether TensorRT runs a bundle for CUDA devices, and not ONNX Runtime."""
    return all(graph.dialect != PAGED.name for graph in bundle.manifest.graphs)


def plan(
    bundle: Bundle, max_batch: int | None, max_len: int | None, devices: Seq[int] | None = None
) -> MemoryPlan:
    """What a setting needs of memory; see ``LLM.plan``.

    Raises:
        BundleError: the bundle has no graph for this backend.
        RequestError: an argument is out of range.
    """
    if not runs_on_gpu(bundle):
        return _plan_slots(bundle, max_batch, max_len, devices)
    from llama_runtime.cuda_loading import opened_devices

    with opened_devices(_ordinals(devices)) as found:
        wanted: MemoryPlan
        if runs_on_tensorrt(bundle):
            wanted = _plan_tensorrt(bundle, max_batch, max_len, found)
        else:
            wanted = _plan_paged(bundle, max_batch, max_len, found)
        for device in found:
            device.close()
    return wanted


def _plan_slots(
    bundle: Bundle, max_batch: int | None, max_len: int | None, devices: Seq[int] | None
) -> MemoryPlan:
    geometry = bundle.manifest.geometry
    bundle.graph_path(SLOTS.name)  # which it may not have
    if devices is not None:
        raise RequestError(
            f"devices {list(devices)} are CUDA devices, and {bundle.path} was built for the CPU: "
            "leave them out, or build it with llama-export build --target cuda",
            param="devices",
        )
    weights = weight_bytes(bundle.manifest, SLOTS.name)
    wanted = MemoryPlan(
        geometry=geometry,
        weights=weights,
        available=available_memory(mapped_bytes=weights),
        max_batch=_batch(max_batch, DEFAULT_MAX_BATCH),
        max_len=_length(max_len, geometry.max_positions),
        prompt_budget=PROMPT_BUDGET,
    )
    return _shortened(wanted, max_len)


def _plan_paged(
    bundle: Bundle, max_batch: int | None, max_len: int | None, devices: Seq[Device]
) -> CudaPlan:
    from llama_runtime.cuda_loading import CUDA_MAX_BATCH, cuda_plan

    batch = _batch(max_batch, CUDA_MAX_BATCH)
    length = _length(max_len, bundle.manifest.geometry.max_positions)
    return _shortened(cuda_plan(bundle, devices, batch, length), max_len)


def _load_paged(
    encoder: PromptEncoder,
    max_batch: int | None,
    max_len: int | None,
    devices: Seq[int] | None,
    params: SamplingParams,
    eos: frozenset[int],
) -> Loaded:
    from llama_runtime.cuda_loading import cuda_engines, opened_devices

    with opened_devices(_ordinals(devices)) as found:
        wanted = _plan_paged(encoder.bundle, max_batch, max_len, found)
        wanted.check()
        engine = cuda_engines(encoder.bundle, found, wanted, encoder.tokenizer.byte_table, eos)
    return Loaded(encoder, wanted, None, params, engine)


def _plan_tensorrt(
    bundle: Bundle, max_batch: int | None, max_len: int | None, devices: Seq[Device]
) -> TensorRtPlan:
    from llama_runtime.tensorrt_loading import tensorrt_plan

    if len(devices) > 1:
        raise RequestError(
            f"devices {[device.ordinal for device in devices]} are several, and a TensorRT engine "
            "runs on one: choose it, or build the bundle with llama-export build --target cuda",
            param="devices",
        )
    batch = _batch(max_batch, DEFAULT_MAX_BATCH)
    length = _length(max_len, bundle.manifest.geometry.max_positions)
    return _shortened(tensorrt_plan(bundle, devices[0], batch, length), max_len)


def _load_tensorrt(
    encoder: PromptEncoder,
    max_batch: int | None,
    max_len: int | None,
    devices: Seq[int] | None,
    params: SamplingParams,
    eos: frozenset[int],
) -> Loaded:
    from llama_runtime.cuda_loading import opened_devices
    from llama_runtime.tensorrt_loading import loaded_engine

    with opened_devices(_ordinals(devices)) as found:
        wanted = _plan_tensorrt(encoder.bundle, max_batch, max_len, found)
        wanted.check()
        byte_table = encoder.tokenizer.byte_table
        engine = loaded_engine(encoder.bundle, found[0], wanted, byte_table, eos)
    return Loaded(encoder, wanted, None, params, engine)


def _refuse_threads(bundle: Bundle, threads: int | None) -> None:
    if threads is not None:
        raise RequestError(
            f"threads {threads} are those of kernels on the CPU, and {bundle.path} was "
            "built for CUDA: leave them out",
            param="threads",
        )


Plan = TypeVar("Plan", bound=MemoryPlan)


def _shortened(wanted: Plan, max_len: int | None) -> Plan:
    """The same with as much of the usual length as fits, unless a length was asked for."""
    if max_len is None and not wanted.fits and wanted.largest_max_len >= LEAST_DEFAULT_LEN:
        return replace(wanted, max_len=wanted.largest_max_len)
    return wanted


def _batch(max_batch: int | None, usual: int) -> int:
    return in_range("max_batch", usual if max_batch is None else max_batch, MAX_BATCH)


def _length(max_len: int | None, limit: int) -> int:
    usual = min(DEFAULT_MAX_LEN, limit)
    return in_range("max_len", usual if max_len is None else max_len, limit, low=MIN_LEN)


def _ordinals(devices: object) -> list[int]:
    """The numbers of CUDA devices, checked as far as that goes without looking at them."""
    if devices is None:
        return [0]
    found: list[object] = list(devices) if isinstance(devices, Seq) else []
    numbers = [one for one in found if isinstance(one, int) and not isinstance(one, bool)]
    if not found or len(set(numbers)) < len(found) or min(numbers) < 0:
        raise RequestError(
            f"devices must be different numbers of CUDA devices, such as [0, 1], not {devices!r}",
            param="devices",
        )
    return numbers


def in_range(param: str, value: object, high: int, *, low: int = 1) -> int:
    """A whole number, sure to lie in its range.

    Raises:
        RequestError: it doesn't, or is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{param} must lie in {low} to {high}, not {value!r}", param=param)
    return value
