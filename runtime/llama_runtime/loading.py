"""From a bundle to an engine that is ready: checks, memory plan, graph, cache."""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.batch_sizer import BatchSizer
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.contract import (
    MIN_CHUNK,
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
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.machine import available_memory, default_threads
from llama_runtime.memory_plan import MemoryPlan, weight_bytes
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.settings import (
    AUTO_MAX_BATCH,
    DEFAULT_MAX_BATCH,
    LEAST_DEFAULT_LEN,
    Settings,
)
from llama_runtime.slots_engine import slots_engine
from llama_runtime.slots_precision import slots_cache_dtype

if TYPE_CHECKING:
    from llama_runtime.backends.cuda_device import Device
    from llama_runtime.cuda_plan import CudaPlan
    from llama_runtime.tensorrt_plan import TensorRtPlan

PROMPT_BUDGET = 256  # prompt tokens of one step
CUDA_STREAM_BUDGET = 512  # while somebody reads a stream; on the CPU it is the least that there is


@dataclass(frozen=True, slots=True)
class Loaded:
    """What ``load`` made of a bundle.

    Attributes:
        encoder: its text side: ``encode`` and ``encode_chat`` give the token ids that ``engine``
            takes.
        memory_plan: what it may take of memory, which is there.
        threads: of the kernels; None on CUDA.
        default_params: sampling where the caller asks for none.
        grammars: what completions are held to is compiled by it, for all engines.
        engine: ready to run; the caller closes it. On several devices it is a group of engines with
            the methods of one.
    """

    encoder: PromptEncoder
    memory_plan: MemoryPlan
    threads: int | None
    default_params: SamplingParams
    grammars: GrammarCompiler
    engine: Engine | EngineGroup


def load(
    bundle: str | os.PathLike[str] | PromptEncoder = "bundle",
    settings: Settings | None = None,
    *,
    verify: Literal["full", "size"] | None = None,
) -> Loaded:
    """Load a bundle for manual control: an ``Engine`` to step, instead of an ``LLM``.

    Args:
        bundle: as for ``LLM``.
        settings: the other arguments of ``LLM``; None takes what is usual.
        verify: how the bundle's files are checked; see ``open_bundle``.

    Raises:
        CaravanError: what ``LLM`` raises.
    """
    settings = settings or Settings()
    encoder = opened(bundle, verify=verify)
    config = encoder.bundle.generation_config
    params, eos = default_params(config), eos_token_ids(config)
    if not runs_on_gpu(encoder.bundle):
        return _load_slots(encoder, settings, params, eos)
    settings.refuse("threads", f"{encoder.bundle.path} was built for CUDA, and has none")
    if runs_on_tensorrt(encoder.bundle):
        return _load_tensorrt(encoder, settings, params, eos)
    return _load_paged(encoder, settings, params, eos)


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


def plan(bundle: Bundle, settings: Settings) -> MemoryPlan:
    """What a setting needs of memory; see ``LLM.plan``.

    Raises:
        BundleError: the bundle has no graph for this backend.
        RequestError: an argument is out of range.
    """
    if not runs_on_gpu(bundle):
        return _plan_slots(bundle, settings)
    from llama_runtime.cuda_loading import opened_devices

    plan_it = _plan_tensorrt if runs_on_tensorrt(bundle) else _plan_paged
    with opened_devices(settings.ordinals()) as found:
        wanted: MemoryPlan = plan_it(bundle, settings, found)
        for device in found:
            device.close()
    return wanted


def _plan_slots(bundle: Bundle, settings: Settings) -> MemoryPlan:
    geometry = bundle.manifest.geometry
    cache_dtype = slots_cache_dtype(bundle)
    settings.refuse(
        "devices",
        f"they are CUDA devices, and {bundle.path} was built for the CPU; llama-export build "
        "--target cuda builds one for them",
    )
    weights = weight_bytes(bundle.manifest, SLOTS.name)
    wanted = MemoryPlan(
        geometry=geometry,
        weights=weights,
        available=available_memory(mapped_bytes=weights),
        max_batch=settings.batch(DEFAULT_MAX_BATCH),
        max_len=settings.length(geometry.max_positions),
        prompt_budget=PROMPT_BUDGET,
        prefix_tokens=settings.num_prefix_tokens(),
        cache_dtype=cache_dtype,
    )
    if settings.prefix_tokens is None and not wanted.fits:
        wanted = replace(wanted, prefix_tokens=wanted.largest_prefix_tokens)
    return _fitted(wanted, settings, AUTO_MAX_BATCH)


def _load_slots(
    encoder: PromptEncoder, settings: Settings, params: SamplingParams, eos: frozenset[int]
) -> Loaded:
    wanted = _plan_slots(encoder.bundle, settings)
    threads = settings.num_threads(default_threads())
    stream_budget = settings.budget(MIN_CHUNK, least=MIN_CHUNK, most=PROMPT_BUDGET)
    wanted.check()
    manifest = encoder.bundle.manifest
    grammars = _grammars(encoder, eos)
    kernels = OrtSampler(encoder.bundle.graph_path(SAMPLER), manifest.geometry.vocab_size, threads)
    backend = OrtCpu(
        open_session(encoder.bundle.graph_path(SLOTS.name), threads),
        manifest.geometry,
        num_slots=wanted.max_batch,
        capacity=cache_capacity(wanted.max_len, PROMPT_CHUNK),
        num_prefix_blocks=wanted.num_prefix_blocks,
        cache_dtype=wanted.cache_dtype,
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
        stream_budget=stream_budget,
        num_prefix_blocks=wanted.num_prefix_blocks,
        kernels=kernels,
        batch_sizer=BatchSizer(wanted.max_batch) if settings.finds_batch else None,
        grammars=grammars,
    )
    return Loaded(encoder, wanted, threads, params, grammars, engine)


def _plan_paged(bundle: Bundle, settings: Settings, devices: Seq[Device]) -> CudaPlan:
    from llama_runtime.cuda_loading import CUDA_AUTO_MAX_BATCH, CUDA_MAX_BATCH, cuda_plan

    settings.refuse(
        "prefix_tokens",
        "on CUDA the whole cache keeps prompts for others, as long as there is room",
        0,
    )
    batch = settings.batch(CUDA_MAX_BATCH)
    length = settings.length(bundle.manifest.geometry.max_positions)
    return _fitted(cuda_plan(bundle, devices, batch, length), settings, CUDA_AUTO_MAX_BATCH)


def _load_paged(
    encoder: PromptEncoder, settings: Settings, params: SamplingParams, eos: frozenset[int]
) -> Loaded:
    from llama_runtime.cuda_loading import CUDA_PROMPT_BUDGET, cuda_engines, opened_devices

    stream_budget = settings.budget(CUDA_STREAM_BUDGET, least=1, most=CUDA_PROMPT_BUDGET)
    with opened_devices(settings.ordinals()) as found:
        wanted = _plan_paged(encoder.bundle, settings, found)
        wanted.check()
        grammars = _grammars(encoder, eos)
        engine = cuda_engines(
            encoder.bundle,
            found,
            wanted,
            encoder.tokenizer.byte_table,
            eos,
            share_prefixes=settings.prefix_tokens is None,
            stream_budget=stream_budget,
            find_batch=settings.finds_batch,
            grammars=grammars,
        )
    return Loaded(encoder, wanted, None, params, grammars, engine)


def _plan_tensorrt(bundle: Bundle, settings: Settings, devices: Seq[Device]) -> TensorRtPlan:
    from llama_runtime.tensorrt_loading import tensorrt_plan

    if len(devices) > 1:
        settings.refuse(
            "devices",
            "a TensorRT engine runs on one; choose it, or build the bundle with llama-export build "
            "--target cuda",
        )
    if settings.finds_batch:
        settings.refuse(
            "max_batch", "a TensorRT engine is built for a number, and has room for so many"
        )
    settings.refuse("prefix_tokens", "TensorRT computes each prompt as a whole", 0)
    settings.refuse("stream_budget", "a step of a TensorRT engine runs one chunk of one prompt")
    batch = settings.batch(DEFAULT_MAX_BATCH)
    length = settings.length(bundle.manifest.geometry.max_positions)
    return _fitted(tensorrt_plan(bundle, devices[0], batch, length), settings, batch)


def _load_tensorrt(
    encoder: PromptEncoder, settings: Settings, params: SamplingParams, eos: frozenset[int]
) -> Loaded:
    from llama_runtime.cuda_loading import opened_devices
    from llama_runtime.tensorrt_loading import loaded_engine

    with opened_devices(settings.ordinals()) as found:
        wanted = _plan_tensorrt(encoder.bundle, settings, found)
        wanted.check()
        byte_table = encoder.tokenizer.byte_table
        grammars = _grammars(encoder, eos)
        engine = loaded_engine(encoder.bundle, found[0], wanted, byte_table, eos, grammars)
    return Loaded(encoder, wanted, None, params, grammars, engine)


def _grammars(encoder: PromptEncoder, eos: frozenset[int]) -> GrammarCompiler:
    bundle = encoder.bundle
    return GrammarCompiler(bundle.tokenizer_path, bundle.manifest.geometry.vocab_size, eos)


Plan = TypeVar("Plan", bound=MemoryPlan)


def _fitted(wanted: Plan, settings: Settings, most: int) -> Plan:
    """The same with as much as fits of what the caller leaves to us.

    First as much of the usual length as fits with the usual batch; then, if the batch is to be
    found, as many slots as fit with that, up to so many: one that isn't used costs nothing.
    """
    shortens = settings.max_len is None and not wanted.fits
    if shortens and wanted.largest_max_len >= LEAST_DEFAULT_LEN:
        wanted = replace(wanted, max_len=wanted.largest_max_len)
    if settings.finds_batch and (largest := min(most, wanted.largest_max_batch)):
        wanted = replace(wanted, max_batch=largest)
    return wanted
