"""An engine over the ``tensorrt`` dialect: sequences hold slots on a CUDA device, steps overlap."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.cuda_sampler import CudaSampler
from llama_runtime.backends.tensorrt_context import Contexts, TensorRtEngine
from llama_runtime.backends.tensorrt_runner import TensorRtRunner, max_rows
from llama_runtime.chunk import any_chunk
from llama_runtime.contract import TENSORRT, DType, Geometry
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.kv_cache import SlotCache
from llama_runtime.scheduler import Scheduler
from llama_runtime.tensorrt.library import Library
from llama_runtime.tensorrt.limits import EngineLimits


def tensorrt_engine(
    library: Library,
    plan: bytes | memoryview,
    geometry: Geometry,
    limits: EngineLimits,
    device: Device,
    token_bytes: TokenBytes,
    eos_token_ids: Collection[int],
    *,
    dtype: DType,
    prompt_budget: int | None = None,
    ids: Iterator[int] | None = None,
    grammars: GrammarCompiler | None = None,
) -> Engine:
    """Make an engine.

    Args:
        library: what built the plan.
        plan: a serialised TensorRT engine, built from a graph of the dialect for ``limits``.
        geometry: the model's numbers.
        limits: what the plan was built for.
        device: where it runs; the engine owns and closes it.
        token_bytes: see ``Engine``.
        eos_token_ids: see ``Engine``.
        dtype: of activations, and of keys and values.
        prompt_budget: the most prompt tokens of one step; None is all that the plan allows.
        ids: see ``Engine``.
        grammars: see ``Engine``.

    Raises:
        BackendError: the plan can't be loaded or is another one, or device memory is short.
    """
    try:
        contexts = TensorRtEngine(library, plan, device)
        dialect = TENSORRT.typed(dtype)
        contexts.check(
            (*dialect.inputs, *dialect.cache_inputs(geometry.num_layers)),
            (dialect.logits, *dialect.cache_outputs(geometry.num_layers)),
            {
                "K": geometry.num_kv_heads,
                "C": limits.capacity,
                "D": geometry.head_dim,
                "V": geometry.vocab_size,
            },
            num_profiles=2,
        )
        return engine_of(
            contexts,
            geometry,
            limits,
            device,
            token_bytes,
            eos_token_ids,
            dtype=dtype,
            prompt_budget=prompt_budget,
            ids=ids,
            grammars=grammars,
        )
    except BaseException:
        device.close()
        raise


def engine_of(
    contexts: Contexts,
    geometry: Geometry,
    limits: EngineLimits,
    device: Device,
    token_bytes: TokenBytes,
    eos_token_ids: Collection[int],
    *,
    dtype: DType,
    prompt_budget: int | None = None,
    ids: Iterator[int] | None = None,
    grammars: GrammarCompiler | None = None,
) -> Engine:
    """The engine over execution contexts, wherever they come from; see ``tensorrt_engine``."""
    sampler = CudaSampler(
        device,
        dtype,
        vocab_size=geometry.vocab_size,
        num_slots=limits.max_batch,
        max_rows=max_rows(limits),
        eos_token_ids=eos_token_ids,
    )
    runner = TensorRtRunner(contexts, geometry, limits, device, sampler, dtype=dtype)
    scheduler = Scheduler(
        SlotCache(limits.max_batch, limits.max_len),
        prompt_budget=min(prompt_budget or limits.max_chunk, limits.max_chunk),
        max_chunk=limits.max_chunk,
        cut=any_chunk,
        max_cells=None,
        max_prompts=1,
        max_logits=limits.max_logits,
    )
    return Engine(
        runner,
        scheduler,
        token_bytes,
        eos_token_ids,
        vocab_size=geometry.vocab_size,
        max_len=limits.max_len,
        ids=ids,
        grammars=grammars,
    )
