"""What a decode step must read and multiply, counted from a bundle."""

from __future__ import annotations

from math import prod
from pathlib import Path

from llama_runtime.bench.work import parameters
from llama_runtime.bundle import Bundle
from llama_runtime.contract import CACHE_ITEM_BYTES, Geometry
from llama_runtime.slots_precision import slots_cache_dtype


def weight_file(bundle: Bundle) -> Path:
    """The one file that a bundle's graph reads its weights from."""
    (name,) = (name for name in bundle.manifest.files if name.endswith(".safetensors"))
    return bundle.path / name


def cache_bytes(bundle: Bundle, tokens: float) -> float:
    """Bytes of the keys and values of so many tokens, which are those of all sequences together."""
    g = bundle.manifest.geometry
    item = CACHE_ITEM_BYTES[slots_cache_dtype(bundle)]
    return tokens * item * prod((2, g.num_layers, g.num_kv_heads, g.head_dim))


def multiply_adds(g: Geometry, batch: int) -> int:
    """Of the products with matrices, head included, in a step of so many tokens."""
    return batch * sum(parameters(g))
