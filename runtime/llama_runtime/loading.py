"""From a bundle to an engine that is ready: checks, memory plan, graph, cache."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.backends.ort_sampler import OrtSampler
from llama_runtime.bundle import Bundle, open_bundle
from llama_runtime.contract import PROMPT_CHUNK, SAMPLER, SLOTS, cache_capacity
from llama_runtime.engine import Engine
from llama_runtime.errors import RequestError
from llama_runtime.generation_config import default_params, eos_token_ids
from llama_runtime.machine import available_memory, default_threads
from llama_runtime.memory_plan import MAX_BATCH, MIN_LEN, MemoryPlan, weight_bytes
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder

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
        threads: of the kernels.
        default_params: sampling where the caller asks for none.
        engine: ready to run.
    """

    encoder: PromptEncoder
    memory_plan: MemoryPlan
    threads: int
    default_params: SamplingParams
    engine: Engine


def load(
    bundle: str | os.PathLike[str] | PromptEncoder,
    *,
    max_batch: int,
    max_len: int | None,
    threads: int | None,
    verify: Literal["full", "size"] | None,
) -> Loaded:
    """Load a bundle; arguments and errors are those of ``LLM``."""
    encoder = opened(bundle, verify=verify)
    manifest, config = encoder.bundle.manifest, encoder.bundle.generation_config
    wanted = plan(encoder.bundle, max_batch, max_len)
    threads = in_range("threads", default_threads() if threads is None else threads, 1024)
    params = default_params(config)
    sampler = encoder.bundle.graph_path(SAMPLER)
    wanted.check()
    kernels = OrtSampler(sampler, manifest.geometry.vocab_size, threads)
    backend = OrtCpu(
        open_session(encoder.bundle.graph_path(SLOTS.name), threads),
        manifest.geometry,
        num_slots=wanted.max_batch,
        capacity=cache_capacity(wanted.max_len, PROMPT_CHUNK),
    )
    engine = Engine(
        backend,
        encoder.tokenizer.byte_table,
        eos_token_ids(config),
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


def plan(bundle: Bundle, max_batch: int, max_len: int | None) -> MemoryPlan:
    """What a setting needs of memory; see ``LLM.plan``.

    Raises:
        BundleError: the bundle has no graph for this backend.
        RequestError: an argument is out of range.
    """
    geometry = bundle.manifest.geometry
    bundle.graph_path(SLOTS.name)  # which it may not have
    weights = weight_bytes(bundle.manifest, SLOTS.name)
    usual = min(DEFAULT_MAX_LEN, geometry.max_positions)
    length = usual if max_len is None else max_len
    wanted = MemoryPlan(
        geometry=geometry,
        weights=weights,
        available=available_memory(mapped_bytes=weights),
        max_batch=in_range("max_batch", max_batch, MAX_BATCH),
        max_len=in_range("max_len", length, geometry.max_positions, low=MIN_LEN),
        prompt_budget=PROMPT_BUDGET,
    )
    if max_len is None and not wanted.fits and wanted.largest_max_len >= LEAST_DEFAULT_LEN:
        return replace(wanted, max_len=wanted.largest_max_len)
    return wanted


def in_range(param: str, value: object, high: int, *, low: int = 1) -> int:
    """A whole number, sure to lie in its range.

    Raises:
        RequestError: it doesn't, or is none.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{param} must lie in {low} to {high}, not {value!r}", param=param)
    return value
