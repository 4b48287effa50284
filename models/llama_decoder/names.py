"""The name table: every parameter of the decoder, and the checkpoint's tensors it is made of.

The names are Hugging Face's but for the fused one, and are the names of the tensors in a bundle
too. ``{i}`` is the layer.

Shape letters are those of ``llama_runtime.contract``; beside them I is the width of the gated MLP,
Q = H·D the rows of the query projection, and U = K·D those of the key or value projection.
"""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One tensor of a checkpoint, which becomes some rows of a parameter.

    Attributes:
        huggingface: its name in safetensors files.
        gguf: its name in GGUF files.
        rows: letter of its number of rows.
        interleaved: letter of the number of heads whose rows llama.cpp's converter interleaves,
            because its RoPE turns neighbours and not halves; empty where it moves no rows.
    """

    huggingface: str
    gguf: str
    rows: str
    interleaved: str = ""


class Row(NamedTuple):
    """One parameter of the decoder.

    Attributes:
        name: the parameter.
        parts: what it is made of, one below the other.
        columns: letter of the number of columns; empty for a vector.
        reason: why it has this name and form.
    """

    name: str
    parts: tuple[Part, ...]
    columns: str
    reason: str


EMBEDDING = "model.embed_tokens.weight"
LAST_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

FIRST = (
    Row(
        EMBEDDING,
        (Part(EMBEDDING, "token_embd.weight", "V"),),
        "E",
        "Hugging Face's name; the output matrix too where the two are tied",
    ),
)
LAYER = (
    Row(
        "model.layers.{i}.input_layernorm.weight",
        (Part("model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight", "E"),),
        "",
        "Hugging Face's name",
    ),
    Row(
        "model.layers.{i}.self_attn.qkv_proj.weight",
        (
            Part("model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight", "Q", "H"),
            Part("model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight", "U", "K"),
            Part("model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight", "U"),
        ),
        "E",
        "fused: one product instead of three, and attention takes q, k and v packed",
    ),
    Row(
        "model.layers.{i}.self_attn.o_proj.weight",
        (Part("model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight", "E"),),
        "Q",
        "Hugging Face's name",
    ),
    Row(
        "model.layers.{i}.post_attention_layernorm.weight",
        (Part("model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight", "E"),),
        "",
        "Hugging Face's name",
    ),
    Row(
        "model.layers.{i}.mlp.gate_proj.weight",
        (Part("model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight", "I"),),
        "E",
        "Hugging Face's name",
    ),
    Row(
        "model.layers.{i}.mlp.up_proj.weight",
        (Part("model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight", "I"),),
        "E",
        "Hugging Face's name",
    ),
    Row(
        "model.layers.{i}.mlp.down_proj.weight",
        (Part("model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight", "E"),),
        "I",
        "Hugging Face's name",
    ),
)
LAST = (
    Row(
        LAST_NORM,
        (Part(LAST_NORM, "output_norm.weight", "E"),),
        "",
        "Hugging Face's name",
    ),
)
UNTIED = (
    Row(
        HEAD,
        (Part(HEAD, "output.weight", "V"),),
        "E",
        "Hugging Face's name; left out where it is the embedding",
    ),
)
