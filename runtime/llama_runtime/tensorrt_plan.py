"""How much memory of a CUDA device a TensorRT engine needs.

The cache has a fixed room for every slot, whether it is used or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llama_runtime.contract import DType
from llama_runtime.memory_plan import MAX_BATCH, MemoryPlan
from llama_runtime.tensorrt.limits import EngineLimits

ITEM_BYTES = 2  # of activations
TABLE_BYTES = 6  # of each token of the vocabulary for each slot: how often it came, its bias
# Not measured: no GPU that TensorRT-RTX runs on was at hand. CUDA's libraries and kernels, rounded
# up from what they take with ONNX Runtime; and what a step holds, were nothing of it reused.
LIBRARY_BYTES = 1_000_000_000
STEP_SLACK = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtPlan(MemoryPlan):
    """See ``MemoryPlan``."""

    cache_dtype: DType = "float16"

    @property
    def limits(self) -> EngineLimits:
        """The sizes that the engine is built for."""
        return EngineLimits(self.max_batch, self.max_len)

    @property
    def cache(self) -> int:
        """Bytes of keys and values, [B, K, C, D] in each layer."""
        return self.token_bytes * self.max_batch * self.limits.capacity

    @property
    def workspace(self) -> int:
        """Bytes of everything else: rows [N] of the largest step, logits [R, V], sampler tables."""
        g, limits = self.geometry, self.limits
        qkv = (g.num_heads + 2 * g.num_kv_heads) * g.head_dim
        row = 2 * qkv + 4 * g.hidden_size + 4 * g.intermediate_size
        step = max(limits.max_batch, limits.max_chunk) * row
        logits = max(limits.max_batch, limits.max_logits) * g.vocab_size
        tables = TABLE_BYTES * limits.max_batch * g.vocab_size
        return LIBRARY_BYTES + int(ITEM_BYTES * (STEP_SLACK * step + logits)) + tables

    @property
    def largest_max_batch(self) -> int:
        """The largest ``max_batch`` that fits with this ``max_len``; 0 if none does."""
        low, high = 0, MAX_BATCH
        while low < high:
            middle = (low + high + 1) // 2
            fits = replace(self, max_batch=middle).fits
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
