"""What a decode step must read and multiply, counted from a bundle."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from llama_runtime.bundle import Bundle
from llama_runtime.contract import CACHE_ITEM_BYTES, Geometry
from llama_runtime.slots_precision import slots_cache_dtype

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = ("rope_cos", "rope_sin")

Entries = dict[str, tuple[tuple[int, ...], int]]


def weight_file(bundle: Bundle) -> Path:
    """The one file that a bundle's graph reads its weights from."""
    (name,) = (name for name in bundle.manifest.files if name.endswith(".safetensors"))
    return bundle.path / name


def stored(path: Path) -> Entries:
    """Shape and bytes of every tensor of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        name: (tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }


def weight_bytes(entries: Entries, batch: int) -> int:
    """Bytes of the weight file that a step of so many tokens can't do without.

    All of what products and norms read; of what is looked up, a row a token: the tables of RoPE,
    and the embedding where it isn't the head as well.
    """
    tied = not any(name.startswith(HEAD) for name in entries)
    total = 0
    for name, (shape, num_bytes) in entries.items():
        looked_up = name in TABLES or (name.startswith(EMBEDDING) and not tied)
        is_rows = looked_up and batch < shape[0] and not name.endswith(".column_scales")
        total += batch * num_bytes // shape[0] if is_rows else num_bytes
    return total


def cache_bytes(bundle: Bundle, tokens: float) -> float:
    """Bytes of the keys and values of so many tokens, which are those of all sequences together."""
    g = bundle.manifest.geometry
    item = CACHE_ITEM_BYTES[slots_cache_dtype(bundle)]
    return tokens * item * prod((2, g.num_layers, g.num_kv_heads, g.head_dim))


def multiply_adds(g: Geometry, batch: int) -> int:
    """Of the products with matrices, head included, in a step of so many tokens."""
    queries, keys = g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim
    attention = g.hidden_size * (queries + 2 * keys) + queries * g.hidden_size
    layer = attention + 3 * g.hidden_size * g.intermediate_size
    return batch * (g.num_layers * layer + g.hidden_size * g.vocab_size)
