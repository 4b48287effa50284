"""Reads the metadata of a GGUF file.

The keys are those of llama.cpp's loader. A ``llama.*`` key that isn't known here may change the
model, so it is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_decoder.config_huggingface import DEFAULT_THETA, split_evenly
from llama_decoder.errors import CheckpointError
from llama_decoder.fields import Fields, quoted

# llama.cpp too reads these, if at all, only for scaling types that are refused here.
WITHOUT_EFFECT = frozenset(
    {
        "llama.tensor_data_layout",
        "llama.rope.scaling.original_context_length",
        "llama.rope.scaling.finetuned",
    }
)

READ = frozenset(
    {
        "llama.vocab_size",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.attention.key_length",
        "llama.attention.value_length",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.rope.dimension_count",
        "llama.rope.freq_base",
        "llama.rope.scaling.type",
        "llama.rope.scaling.factor",
        "llama.rope.scale_linear",
        "llama.expert_count",
        "llama.expert_used_count",
    }
)


def read(metadata: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The arguments of ``LlamaConfig`` and, if frequencies are scaled, of ``RopeScaling``.

    Args:
        metadata: key to value, as plain Python values.

    Raises:
        CheckpointError: it isn't a Llama, asks for something unsupported, or lacks a value.
    """
    fields = Fields(metadata, "the GGUF metadata")
    _refuse_what_is_unsupported(fields)
    hidden_size = fields.whole("llama.embedding_length")
    num_heads = fields.whole("llama.attention.head_count")
    eps = fields.maybe_real("llama.attention.layer_norm_rms_epsilon")
    if eps is None:
        raise CheckpointError("the GGUF metadata has no llama.attention.layer_norm_rms_epsilon")
    theta = fields.maybe_real("llama.rope.freq_base")
    return {
        "vocab_size": _read_vocab_size(fields),
        "hidden_size": hidden_size,
        "intermediate_size": fields.whole("llama.feed_forward_length"),
        "num_layers": fields.whole("llama.block_count"),
        "num_heads": num_heads,
        "num_kv_heads": fields.whole("llama.attention.head_count_kv", num_heads),
        "head_dim": _read_head_dim(fields, hidden_size, num_heads),
        "rms_norm_eps": eps,
        "rope_theta": DEFAULT_THETA if theta is None else theta,
        "max_positions": fields.whole("llama.context_length"),
    }, _read_scaling(fields)


def _refuse_what_is_unsupported(fields: Fields) -> None:
    architecture = fields.maybe_text("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"general.architecture in {fields.source} is {quoted(architecture)}; only 'llama' is "
            "supported"
        )
    if fields.whole("split.count", 1) > 1:
        raise CheckpointError(
            "this GGUF file is one part of several; join them first with "
            "`llama-gguf-split --merge FIRST_PART OUTPUT`"
        )
    if fields.whole("llama.expert_count", 0) or fields.whole("llama.expert_used_count", 0):
        raise CheckpointError("the GGUF file is a mixture of experts, which is not supported")
    known = READ | WITHOUT_EFFECT
    unknown = sorted(key for key in fields if key.startswith("llama.") and key not in known)
    if unknown:
        raise CheckpointError(f"{fields.source} has {quoted(unknown)}, which is not supported")


def _read_vocab_size(fields: Fields) -> int:
    tokens = fields.get("tokenizer.ggml.tokens")
    return fields.whole("llama.vocab_size", len(tokens) if isinstance(tokens, list) else None)


def _read_head_dim(fields: Fields, hidden_size: int, num_heads: int) -> int:
    """D; the whole of each head must be rotated, and keys be as wide as values."""
    head_dim = fields.maybe_whole("llama.attention.key_length")
    if head_dim is None:
        head_dim = split_evenly(hidden_size, num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        other = fields.whole(key, head_dim)
        if other != head_dim:
            raise CheckpointError(
                f"{key} in {fields.source} is {other}; only the head dimension, {head_dim}, is "
                "supported"
            )
    return head_dim


def _read_scaling(fields: Fields) -> dict[str, Any] | None:
    """Linear scaling, which is what llama.cpp takes a factor without a type for."""
    kind = fields.maybe_text("llama.rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise CheckpointError(
            f"llama.rope.scaling.type in {fields.source} is {quoted(kind)}; only none and linear "
            "are supported"
        )
    factor = fields.maybe_real("llama.rope.scaling.factor")
    if factor is None:
        factor = fields.maybe_real("llama.rope.scale_linear")  # the key's name in old files
    if kind == "none" or not factor or factor == 1.0:
        return None
    return {"kind": "linear", "factor": factor}
