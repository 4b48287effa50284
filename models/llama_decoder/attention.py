"""Attention over packed tokens and an explicit cache, once for each dialect.

A dialect is a function from the packed projections of one layer and its cache to the packed
result and the cache after the step. ``eager_attention`` is plain torch and the reference that
parity is measured against; ``slots_attention`` emits the operator that ONNX Runtime's CPU runs.
Both take the inputs of the ``slots`` contract, so the same arrays drive either.
``paged_attention`` emits the operator that ONNX Runtime's CUDA provider runs, and
``tensorrt_attention`` the standard's operators, which TensorRT has layers for.

Shape letters are those of ``llama_runtime.contract``; W = (H + 2K)·D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_decoder.config import LlamaConfig


class SlotInputs(NamedTuple):
    """Where the packed tokens of a step live, in ``slots``."""

    unpack: Tensor  # int64 [B, S]
    pack: Tensor  # int64 [N]
    seqlens_k: Tensor  # int32 [B]
    query_seqlens: Tensor  # int32 [B]
    total_sequence_length: Tensor  # int32 []


class PagedInputs(NamedTuple):
    """Where the packed tokens of a step live, in ``paged``."""

    cumulative_sequence_length: Tensor  # int32 [B+1]
    past_seqlens: Tensor  # int32 [B]
    block_table: Tensor  # int32 [B, P]
    slot_mapping: Tensor  # int32 [N]
    attention_metadata: Tensor  # int32 [3], in CPU memory


class TensorRtInputs(NamedTuple):
    """Where the packed tokens of a step live, in ``tensorrt``; see ``tensorrt_places``."""

    unpack: Tensor  # int64 [B, S]
    pack: Tensor  # int64 [N]
    past_lengths: Tensor  # int64 [B]
    positions: Tensor  # int64 [B, S]
    mask: Tensor  # bool [B, 1, S, C]: which cells of its slot each new token sees


class Attention(Protocol):
    """Attention of one layer in one dialect."""

    def __call__(
        self,
        config: LlamaConfig,
        qkv: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        places: Sequence[Tensor],
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend.

        Args:
            config: the model's numbers.
            qkv: [N, W], query, key and value rows of the packed tokens, before RoPE.
            past_key: the layer's keys, RoPE applied, with the axes that the dialect gives a cache.
            past_value: the layer's values.
            places: where each packed token belongs: the contract's inputs between ids and cache.
            cos: [positions, D/2].
            sin: [positions, D/2].

        Returns:
            The attended rows [N, H·D], and the keys and values with the new tokens in place.
        """


def slots_attention(
    config: LlamaConfig,
    qkv: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    places: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Emit com.microsoft.GroupQueryAttention, RoPE and cache write inside; see ``Attention``.

    Source: the operator's schema in ONNX Runtime 1.32 (docs/ContribOperators.md).
    """
    slots = SlotInputs(*places)
    cells = F.embedding(slots.unpack, qkv)  # [B, S, W], spelled so that it exports as one Gather
    num_slots, width = slots.unpack.shape
    attended_size = config.num_heads * config.head_dim
    inputs: list[Tensor | None] = [None] * 17
    inputs[0] = cells
    inputs[3:9] = [
        past_key,
        past_value,
        slots.seqlens_k,
        slots.total_sequence_length,
        cos,
        sin,
    ]
    inputs[16] = slots.query_seqlens
    attended, key, value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attrs={
            "num_heads": config.num_heads,
            "kv_num_heads": config.num_kv_heads,
            "do_rotary": 1,
        },
        dtypes=(qkv.dtype, past_key.dtype, past_value.dtype),
        shapes=((num_slots, width, attended_size), past_key.shape, past_value.shape),
        version=1,
    )
    return attended.reshape(-1, attended_size).index_select(0, slots.pack), key, value


def paged_attention(
    config: LlamaConfig,
    qkv: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    places: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Emit com.microsoft.PagedAttention, RoPE and cache write inside; see ``Attention``.

    Source: the operator's schema in ONNX Runtime 1.31 (docs/ContribOperators.md).
    """
    paged = PagedInputs(*places)
    inputs: list[Tensor | None] = [None] * 17
    inputs[0] = qkv
    inputs[3:11] = [
        past_key,
        past_value,
        paged.cumulative_sequence_length,
        paged.past_seqlens,
        paged.block_table,
        cos,
        sin,
        paged.slot_mapping,
    ]
    inputs[16] = paged.attention_metadata
    attended, key, value = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::PagedAttention",
        inputs,
        attrs={
            "num_heads": config.num_heads,
            "kv_num_heads": config.num_kv_heads,
            "do_rotary": 1,
        },
        dtypes=(qkv.dtype, past_key.dtype, past_value.dtype),
        shapes=(
            (qkv.shape[0], config.num_heads * config.head_dim),
            past_key.shape,
            past_value.shape,
        ),
        version=1,
    )
    return attended, key, value


def tensorrt_places(places: Sequence[Tensor], past_key: Tensor) -> TensorRtInputs:
    """What all layers share: positions, and causality spelled out as a mask.

    TensorRT's parser drops the lengths that opset 24's Attention takes, and would align its causal
    mask with the wrong corner, without an error. A mask is what it can't misunderstand.

    Args:
        places: ``unpack``, ``pack`` and ``past_lengths``, as the graph gets them.
        past_key: of any layer, [B, K, C, D].
    """
    unpack, pack, past_lengths = places
    positions = past_lengths[:, None] + torch.arange(unpack.shape[1])
    mask = torch.arange(past_key.shape[2]) <= positions[:, :, None]
    return TensorRtInputs(unpack, pack, past_lengths, positions, mask[:, None])


def tensorrt_attention(
    config: LlamaConfig,
    qkv: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    places: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Emit opset 24's RotaryEmbedding, TensorScatter and Attention; see ``Attention``.

    ``places`` are those of ``tensorrt_places``. Cells beyond a slot's new tokens are written too,
    behind them, where nothing looks before it is written again.

    Source: the operators' specifications (onnx.ai, opset 24).
    """
    inputs = TensorRtInputs(*places)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    num_slots, width = inputs.unpack.shape
    cells = F.embedding(inputs.unpack, qkv)  # [B, S, W], spelled so that it exports as one Gather
    cells = cells.view(num_slots, width, heads + 2 * kv_heads, dim).transpose(1, 2)
    query, new_key, new_value = torch.split(cells, [heads, kv_heads, kv_heads], dim=1)

    def rotated(x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "RotaryEmbedding",
            [x, cos, sin, inputs.positions],
            dtype=x.dtype,
            shape=x.shape,
            version=23,
        )

    def written(cache: Tensor, new: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            [cache, new, inputs.past_lengths],
            {"axis": -2, "mode": "linear"},
            dtype=cache.dtype,
            shape=cache.shape,
            version=24,
        )

    key, value = written(past_key, rotated(new_key)), written(past_value, new_value)
    attended = torch.onnx.ops.symbolic(
        "Attention",
        [rotated(query), key, value, inputs.mask],
        {"is_causal": 0},
        dtype=query.dtype,
        shape=query.shape,
        version=24,
    )
    rows = attended.transpose(1, 2).reshape(num_slots * width, heads * dim)
    return rows.index_select(0, inputs.pack), key, value


def eager_attention(
    config: LlamaConfig,
    qkv: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    places: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend in plain torch; see ``Attention``. The cache that comes in is left as it was."""
    slots = SlotInputs(*places)
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    num_slots, width = slots.unpack.shape
    capacity = past_key.shape[2]

    cells = qkv[slots.unpack].view(num_slots, width, heads + 2 * kv_heads, dim)
    query, new_key, new_value = torch.split(cells, [heads, kv_heads, kv_heads], dim=2)

    columns = torch.arange(width)
    past = slots.seqlens_k + 1 - slots.query_seqlens  # [B]; meaningless for an inactive slot
    positions = (past[:, None] + columns).clamp(0, capacity - 1).long()  # [B, S]
    slot, column = (columns < slots.query_seqlens[:, None]).nonzero(as_tuple=True)
    position = positions[slot, column]

    query = _rotate(query, cos[positions], sin[positions])
    new_key = _rotate(new_key, cos[positions], sin[positions])
    key, value = past_key.clone(), past_value.clone()
    key[slot, :, position] = new_key[slot, column]
    value[slot, :, position] = new_value[slot, column]

    causal = torch.arange(capacity) <= positions[:, :, None]  # [B, S, C]
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),  # [B, H, S, D]
        key,
        value,
        attn_mask=causal[:, None],
        enable_gqa=True,
    )
    attended = attended.transpose(1, 2).reshape(num_slots * width, heads * dim)
    return attended[slots.pack], key, value


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the half-split layout of Hugging Face checkpoints: x [B, S, heads, D]."""
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, S, 1, D/2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
