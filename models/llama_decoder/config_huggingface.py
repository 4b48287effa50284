"""Reads the ``config.json`` of a Hugging Face directory.

The reference is transformers' ``LlamaConfig``: a key it doesn't read can't change the model, so it
is passed over here too. A key that would change the model and isn't supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from llama_decoder.errors import CheckpointError
from llama_decoder.fields import Fields, quoted

_T = TypeVar("_T")

DEFAULT_POSITIONS = 2048
DEFAULT_EPS = 1e-6
DEFAULT_THETA = 10_000.0

# What the decoder can't do otherwise. An absent key means the one value that is supported.
ONLY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,  # rotates only a part of every head
    "rope_interleaved": False,  # another order of the rows of q and k, as nanotron has it
}

ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
}
ROPE_KEYS_OF_ALL = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def read(config: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The arguments of ``LlamaConfig`` and, if frequencies are scaled, of ``RopeScaling``.

    Args:
        config: the parsed file.

    Raises:
        CheckpointError: it isn't a Llama, asks for something unsupported, or lacks a value.
    """
    fields = Fields(config, "config.json")
    _refuse_what_is_unsupported(fields)
    hidden_size = fields.whole("hidden_size")
    num_heads = fields.whole("num_attention_heads")
    head_dim = fields.maybe_whole("head_dim")
    eps = fields.maybe_real("rms_norm_eps")
    theta, scaling = _read_rope(fields)
    return {
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": fields.whole("intermediate_size"),
        "num_layers": fields.whole("num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": fields.whole("num_key_value_heads", num_heads),
        "head_dim": split_evenly(hidden_size, num_heads) if head_dim is None else head_dim,
        "rms_norm_eps": DEFAULT_EPS if eps is None else eps,
        "rope_theta": theta,
        "max_positions": fields.whole("max_position_embeddings", DEFAULT_POSITIONS),
        "tie_embeddings": fields.flag("tie_word_embeddings", default=False),
    }, scaling


def split_evenly(hidden_size: int, num_heads: int) -> int:
    """D where a checkpoint doesn't say it.

    Raises:
        CheckpointError: the heads don't divide the hidden size.
    """
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(
            f"the hidden size, {hidden_size}, is no multiple of the number of heads, {num_heads}"
        )
    return hidden_size // num_heads


def _refuse_what_is_unsupported(fields: Fields) -> None:
    if fields.get("model_type") != "llama":
        raise CheckpointError(
            f"model_type in config.json is {quoted(fields.get('model_type'))}; only 'llama' is "
            "supported"
        )
    for key in ("quantization_config", "compression_config"):
        if fields.get(key) is not None:
            method = fields.section(key).get("quant_method")
            raise CheckpointError(
                f"config.json has a {key} (method {quoted(method)}); use the checkpoint that "
                "isn't quantised, or a GGUF file of it"
            )
    if "AutoModelForCausalLM" in fields.section("auto_map"):
        raise CheckpointError(
            "config.json has an auto_map: the checkpoint brings a model of its own as Python "
            "code, which is never run; only the plain Llama is supported"
        )
    for key, supported in ONLY.items():
        _refuse_other(fields, key, supported)


def _refuse_other(fields: Fields, key: str, supported: object) -> None:
    value = fields.get(key)
    if value is not None and value != supported:
        raise CheckpointError(
            f"{key} in {fields.source} is {quoted(value)}; only {quoted(supported)} is supported"
        )


def _read_rope(fields: Fields) -> tuple[float, dict[str, Any] | None]:
    """RoPE base and scaling, from either spelling; transformers 5 writes the second."""
    spellings = [fields.section(key) for key in ("rope_scaling", "rope_parameters")]
    given = [section for section in spellings if any(True for _ in section)]
    read = [_read_rope_section(fields, section) for section in given or spellings]
    if read[0] != read[-1]:
        raise CheckpointError(
            "rope_scaling and rope_parameters in config.json contradict each other"
        )
    return read[0]


def _read_rope_section(fields: Fields, section: Fields) -> tuple[float, dict[str, Any] | None]:
    kind = _agreed(
        section, "rope_type", section.maybe_text("rope_type"), section.maybe_text("type")
    )
    kind = kind or "default"
    if kind not in ROPE_KEYS:
        raise CheckpointError(
            f"RoPE type {quoted(kind)} in {section.source} is not supported; only "
            f"{', '.join(ROPE_KEYS)} are"
        )
    _refuse_other(section, "partial_rotary_factor", 1.0)
    unknown = sorted(set(section) - ROPE_KEYS_OF_ALL - ROPE_KEYS[kind])
    if unknown:
        raise CheckpointError(
            f"{section.source} has {quoted(unknown)}, which RoPE type {kind} doesn't take"
        )
    theta = _agreed(
        section, "rope_theta", section.maybe_real("rope_theta"), fields.maybe_real("rope_theta")
    )
    return DEFAULT_THETA if theta is None else theta, _read_scaling(fields, section, kind)


def _read_scaling(fields: Fields, section: Fields, kind: str) -> dict[str, Any] | None:
    if kind == "default":
        return None
    factor = section.maybe_real("factor")
    if factor is None:
        raise CheckpointError(f"{section.source} has no factor, which RoPE type {kind} needs")
    if kind == "linear":
        return {"kind": kind, "factor": factor}
    key = "original_max_position_embeddings"
    positions = _agreed(section, key, section.maybe_whole(key), fields.maybe_whole(key))
    if positions is None:
        positions = fields.whole("max_position_embeddings", DEFAULT_POSITIONS)
    return {
        "kind": kind,
        "factor": factor,
        "low_freq_factor": section.maybe_real("low_freq_factor"),
        "high_freq_factor": section.maybe_real("high_freq_factor"),
        "original_max_positions": positions,
    }


def _agreed(section: Fields, key: str, first: _T | None, second: _T | None) -> _T | None:
    """What two places that may both say the same thing say."""
    if first is not None and second is not None and first != second:
        raise CheckpointError(
            f"{key} of {section.source} is given twice, as {quoted(first)} and {quoted(second)}"
        )
    return second if first is None else first
