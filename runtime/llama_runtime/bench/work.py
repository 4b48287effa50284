"""What a run had to read and multiply, counted from the bundle and from what was asked.

Bytes: of the weight file all that products and norms read, once a run of the graph, and of what is
looked up (embedding, tables of RoPE) a row a token; and for each token that is decoded the keys and
values of those before it. Operations: two for each parameter of a layer's products and each token,
and of the head for each token that is drawn. Attention's own products and all else are not counted,
which lowers a share.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Seq
from math import prod
from pathlib import Path

from llama_runtime.bundle import Bundle
from llama_runtime.contract import CACHE_ITEM_BYTES, DType, Geometry

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TABLES = ("rope_cos", "rope_sin")

Entries = dict[str, tuple[tuple[int, ...], int]]


class Work:
    """Counts the work of runs of a bundle.

    Args:
        bundle: the bundle.
        cache_dtype: of keys and values.
    """

    def __init__(self, bundle: Bundle, cache_dtype: DType) -> None:
        self._geometry = bundle.manifest.geometry
        weights = [name for name in bundle.manifest.files if name.endswith(".safetensors")]
        self._entries = stored(bundle.path / weights[0]) if len(weights) == 1 else {}
        g = self._geometry
        item = CACHE_ITEM_BYTES[cache_dtype]
        self._token_bytes = item * prod((2, g.num_layers, g.num_kv_heads, g.head_dim))

    def read_bytes(self, lengths: Seq[tuple[int, int]], num_steps: int) -> int:
        """Bytes that a run can't do without.

        Args:
            lengths: prompt and completion tokens of each request.
            num_steps: runs of the graph.
        """
        computed = sum(prompt + new - 1 for prompt, new in lengths)
        weights = weight_bytes(self._entries, computed / max(num_steps, 1))
        cached = sum((new - 1) * prompt + new * (new - 1) // 2 for prompt, new in lengths)
        return round(num_steps * weights) + cached * self._token_bytes

    def operations(self, lengths: Seq[tuple[int, int]]) -> int:
        """Operations of its products; a multiply-add is two."""
        layers, head = parameters(self._geometry)
        computed = sum(prompt + new - 1 for prompt, new in lengths)
        drawn = sum(new for _, new in lengths)
        return 2 * (layers * computed + head * drawn)


def stored(path: Path) -> Entries:
    """Shape and bytes of every tensor of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        name: (tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }


def weight_bytes(entries: Entries, tokens: float) -> float:
    """Bytes of the weight file that a step of so many tokens can't do without."""
    tied = not any(name.startswith(HEAD) for name in entries)
    total = 0.0
    for name, (shape, num_bytes) in entries.items():
        looked_up = name in TABLES or (name.startswith(EMBEDDING) and not tied)
        is_rows = looked_up and tokens < shape[0] and not name.endswith(".column_scales")
        total += tokens * num_bytes / shape[0] if is_rows else num_bytes
    return total


def parameters(g: Geometry) -> tuple[int, int]:
    """Of the matrices of all layers, and of the head."""
    queries, keys = g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim
    attention = g.hidden_size * (queries + 2 * keys) + queries * g.hidden_size
    layer = attention + 3 * g.hidden_size * g.intermediate_size
    return g.num_layers * layer, g.hidden_size * g.vocab_size
