"""An engine over the ``slots`` dialect: sequences hold slots, and every step runs here and now."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from llama_runtime.backends.base import Backend
from llama_runtime.batch_sizer import BatchSizer
from llama_runtime.contract import MIN_CHUNK
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.host_masks import HostMasks
from llama_runtime.kv_cache import SlotCache
from llama_runtime.prefix_store import PrefixStore
from llama_runtime.runner import HostRunner
from llama_runtime.sampler import Sampler
from llama_runtime.sampling import Kernels, Reference
from llama_runtime.scheduler import Scheduler
from llama_runtime.step_batch import StepBatch


def slots_engine(
    backend: Backend,
    token_bytes: TokenBytes,
    eos_token_ids: Collection[int],
    *,
    vocab_size: int,
    max_batch: int,
    max_len: int,
    prompt_budget: int,
    max_chunk: int,
    stream_budget: int = MIN_CHUNK,
    num_prefix_blocks: int = 0,
    refill: bool = True,
    kernels: Kernels | None = None,
    ids: Iterator[int] | None = None,
    grammars: GrammarCompiler | None = None,
    batch_sizer: BatchSizer | None = None,
) -> Engine:
    """Make an engine.

    Args:
        backend: runs the graph; the engine owns and closes it.
        token_bytes: see ``Engine``.
        eos_token_ids: see ``Engine``.
        vocab_size: V.
        max_batch: B, sequences that run at once.
        max_len: the most tokens of one sequence, prompt and completion.
        prompt_budget: the most prompt tokens of one step.
        max_chunk: the most prompt tokens of one sequence in one step.
        stream_budget: see ``Scheduler``.
        num_prefix_blocks: blocks of the backend in which the beginnings of prompts are kept for
            others; 0 computes each prompt as a whole.
        refill: False gives fixed batches, for comparison.
        kernels: what chooses tokens; None computes in numpy.
        ids: see ``Engine``.
        grammars: see ``Engine``.
        batch_sizer: see ``Engine``.
    """
    prefixes = PrefixStore(num_prefix_blocks, backend) if num_prefix_blocks else None
    scheduler = Scheduler(
        SlotCache(max_batch, max_len, prefixes),
        prompt_budget=prompt_budget,
        max_chunk=max_chunk,
        stream_budget=stream_budget,
        refill=refill,
    )
    runner = HostRunner(
        backend,
        StepBatch(max_batch, prompt_budget, backend.row_multiple),
        Sampler(kernels or Reference(), frozenset(eos_token_ids)),
        HostMasks(vocab_size),
    )
    return Engine(
        runner,
        scheduler,
        token_bytes,
        eos_token_ids,
        vocab_size=vocab_size,
        max_len=max_len,
        ids=ids,
        grammars=grammars,
        batch_sizer=batch_sizer,
    )
