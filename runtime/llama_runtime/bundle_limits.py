"""How large the files of a bundle may be, before any is hashed or read whole."""

from __future__ import annotations

from pathlib import Path

from llama_runtime.contract import MAX_CHUNK, Geometry
from llama_runtime.errors import BundleError
from llama_runtime.manifest import Manifest

TOKENIZER = "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_FIXTURE = "chat_fixture.json"
REFERENCE_LOGPROBS = "reference_logprobs.bin"
MAX_REFERENCE_BYTES = 2**24  # twice what the evaluation texts come to
MAX_TEXT_BYTES = 2**20
_TOKENIZER_BYTES_PER_TOKEN = 512  # Llama 3's has 140
_MAX_GRAPH_BYTES = 2**26


def check_limits(root: Path, manifest: Manifest) -> None:
    """Refuse what is larger than a model of this geometry needs.

    Args:
        root: the bundle, for messages.
        manifest: whose sizes are those of the files.

    Raises:
        BundleError: names a file, or the whole.
    """
    vocab_bytes = _TOKENIZER_BYTES_PER_TOKEN * manifest.geometry.vocab_size
    limits = {
        TOKENIZER: MAX_TEXT_BYTES + vocab_bytes,
        GENERATION_CONFIG: MAX_TEXT_BYTES,
        CHAT_TEMPLATE: MAX_TEXT_BYTES,
        CHAT_FIXTURE: MAX_TEXT_BYTES,
        REFERENCE_LOGPROBS: MAX_REFERENCE_BYTES,
    }
    for name, limit in limits.items():
        if name in manifest.files and manifest.files[name].size > limit:
            raise BundleError(
                f"{root / name} has {manifest.files[name].size:,} bytes and may have {limit:,} at "
                "most: rebuild it with llama-export build"
            )
    total = sum(entry.size for entry in manifest.files.values())
    limit = sum(limits.values()) + len(manifest.graphs) * _most_weight_bytes(manifest.geometry)
    if total > limit:
        raise BundleError(
            f"the bundle {root} has {total:,} bytes and a model of its geometry {limit:,} at most: "
            "rebuild it with llama-export build"
        )


def _most_weight_bytes(geometry: Geometry) -> int:
    """Bytes of all weights and RoPE tables in float32, and a tenth for what else a graph needs."""
    g = geometry
    attention = 2 * (g.num_heads + g.num_kv_heads) * g.head_dim * g.hidden_size
    layer = attention + 3 * g.hidden_size * g.intermediate_size + 2 * g.hidden_size
    positions = g.max_positions + MAX_CHUNK
    values = (
        2 * g.vocab_size * g.hidden_size
        + g.num_layers * layer
        + g.hidden_size
        + positions * g.head_dim
    )
    return 4 * values * 11 // 10 + _MAX_GRAPH_BYTES
