"""An engine over the ``paged`` dialect: sequences hold blocks on a CUDA device, steps overlap."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.ort_cuda import OrtCuda
from llama_runtime.batch_sizer import BatchSizer
from llama_runtime.chunk import any_chunk
from llama_runtime.contract import DType, Geometry
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.paged_cache import PagedCache
from llama_runtime.scheduler import Scheduler

# A step of one short prompt takes about as long here as one that decodes for everybody. 8 decoding
# steps of a 1B model are 11 ms; among completions of 40 tokens a slot is empty for a tenth of them.
GATHER = 8


def cuda_engine(
    graph: Path,
    geometry: Geometry,
    device: Device,
    token_bytes: TokenBytes,
    eos_token_ids: Collection[int],
    *,
    dtype: DType,
    cache_dtype: DType | None = None,
    max_batch: int,
    max_len: int,
    num_blocks: int,
    block_size: int,
    prompt_budget: int,
    stream_budget: int | None = None,
    share_prefixes: bool = True,
    ids: Iterator[int] | None = None,
    grammars: GrammarCompiler | None = None,
    batch_sizer: BatchSizer | None = None,
) -> Engine:
    """Make an engine.

    Args:
        graph: an ONNX file in the ``paged`` dialect.
        geometry: the model's numbers.
        device: where it runs; the engine owns and closes it.
        token_bytes: see ``Engine``.
        eos_token_ids: see ``Engine``.
        dtype: of activations.
        cache_dtype: of keys and values; None is that of activations.
        max_batch: B, sequences that run at once.
        max_len: the most tokens of one sequence, prompt and completion.
        num_blocks: of the cache, which hold ``max_len`` tokens at least.
        block_size: tokens of one block.
        prompt_budget: the most prompt tokens of one step, of one sequence or of several.
        stream_budget: see ``Scheduler``.
        share_prefixes: whether prompts that begin alike share blocks.
        ids: see ``Engine``.
        grammars: see ``Engine``.
        batch_sizer: see ``Engine``.

    Raises:
        DependencyError: onnxruntime has no CUDA provider.
        BackendError: the graph can't be loaded, or device memory is short.
    """
    if num_blocks * block_size < max_len:
        raise ValueError(f"{num_blocks} blocks of {block_size} tokens hold no {max_len} tokens")
    cache = PagedCache(max_batch, max_len, num_blocks, block_size, share_prefixes=share_prefixes)
    try:
        runner = OrtCuda(
            graph,
            geometry,
            device,
            cache,
            dtype=dtype,
            cache_dtype=cache_dtype,
            prompt_budget=prompt_budget,
            eos_token_ids=eos_token_ids,
        )
    except BaseException:
        device.close()
        raise
    scheduler = Scheduler(
        cache,
        prompt_budget=prompt_budget,
        max_chunk=prompt_budget,
        stream_budget=stream_budget,
        cut=any_chunk,
        max_cells=None,
        gather=GATHER,
    )
    return Engine(
        runner,
        scheduler,
        token_bytes,
        eos_token_ids,
        vocab_size=geometry.vocab_size,
        max_len=max_len,
        ids=ids,
        grammars=grammars,
        batch_sizer=batch_sizer,
    )
