"""How much memory of a CUDA device a bundle needs.

The cache is a pool of blocks that sequences share, so it takes what the device has left, up to what
``max_batch`` sequences of ``max_len`` tokens could fill. An admitted sequence holds all blocks it
may need; others wait while the pool is full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama_runtime.contract import DType, max_logits_rows
from llama_runtime.memory_plan import MAX_BATCH, MemoryPlan, megabytes
from llama_runtime.step_arrays import row_buckets

ITEM_BYTES = 2  # of activations
TABLE_BYTES = 6  # of each token of the vocabulary for each slot: how often it came, its bias
# Measured with onnxruntime-gpu 1.31 on an H100 (docs/performance.md), and rounded up: CUDA's
# libraries and modules, workspaces of products, and captured graphs.
LIBRARY_BYTES = 700_000_000
ARENA_SLACK = 1.5  # what onnxruntime's arena holds, over what a step needs
MARGIN = 0.02  # of the device, for what fragments


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaPlan(MemoryPlan):
    """See ``MemoryPlan``; of several devices, this is about the fullest.

    Attributes:
        block_size: tokens of one block.
    """

    block_size: int
    cache_dtype: DType = "float16"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values of all layers."""
        return self.token_bytes * self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool; at least what one sequence needs, whether they fit or not."""
        one = -(-self.max_len // self.block_size)
        left = self.available.num_bytes - self.weights - self.workspace
        return max(one, min(self.max_batch * one, left // self.block_bytes))

    @property
    def cache(self) -> int:
        """Bytes of the pool."""
        return self.num_blocks * self.block_bytes

    @property
    def workspace(self) -> int:
        """Bytes of everything else.

        The largest step of prompts holds its rows, [N], several times over; the head its logits,
        [R, V]; the sampler two tables, [B, V].
        """
        g = self.geometry
        qkv = (g.num_heads + 2 * g.num_kv_heads) * g.head_dim
        row = 2 * qkv + 4 * g.hidden_size + 4 * g.intermediate_size
        step = max(self.max_batch, self.prompt_budget) * row
        rows = max(row_buckets(self.max_batch)[-1], max_logits_rows(self.max_batch))
        logits = rows * g.vocab_size
        tables = TABLE_BYTES * self.max_batch * g.vocab_size
        return LIBRARY_BYTES + int(ITEM_BYTES * (ARENA_SLACK * step + logits)) + tables

    @property
    def largest_max_batch(self) -> int:
        """The largest ``max_batch`` whose workspace leaves room for one sequence; 0 if none does.

        More sequences share the pool, and wait while it is full.
        """
        low, high = 0, MAX_BATCH
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if replace(self, max_batch=middle).fits else (low, middle - 1)
            )
        return low

    def summary(self) -> str:
        """The plan in one line."""
        return (
            f"memory: weights {megabytes(self.weights)}, cache {megabytes(self.cache)} "
            f"({self.num_blocks * self.block_size:,} tokens in blocks of {self.block_size}), "
            f"workspace {megabytes(self.workspace)}; {megabytes(self.available.num_bytes)} "
            f"available on {self.available.bound}"
        )


def block_size_of(head_dim: int) -> int:
    """Tokens of a block: the least that Flash attention takes, so that prompts run in it.

    Source: PagedAttention of ONNX Runtime 1.31 (paged_attention.cc).
    """
    return 256 if head_dim <= 64 else 128
