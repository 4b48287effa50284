"""The Llama decoder over packed tokens, with the cache as arguments and results.

One module serves every dialect: all of it but attention works on N packed rows, and attention is
the function it was given. The parameters carry the names of ``llama_decoder.weights``, which are
also the names of the tensors in a bundle.

Shape letters are those of ``llama_runtime.contract``; I is the width of the gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama_decoder.attention import Attention, eager_attention
from llama_decoder.config import LlamaConfig
from llama_decoder.rope import rope_tables
from llama_runtime.contract import MAX_CHUNK

KeyValue = tuple[Tensor, Tensor]  # with the axes that the dialect gives a cache
Prepare = Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]]


class SelfAttention(nn.Module):
    """Projections around the dialect's attention."""

    def __init__(self, config: LlamaConfig, attention: Attention) -> None:
        super().__init__()
        rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.config = config
        self.attention = attention
        self.qkv_proj = nn.Linear(config.hidden_size, rows, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, past: KeyValue, places: Sequence[Tensor], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """[N, E] -> [N, E] and the cache after the step."""
        qkv = self.qkv_proj(x)
        attended, key, value = self.attention(self.config, qkv, *past, places, cos, sin)
        return self.o_proj(attended), (key, value)


class GatedMLP(nn.Module):
    """SwiGLU; as one product, gate and up would have to be copied apart."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, E] -> [N, E]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        # Spelled out: ONNX Runtime fuses x·sigmoid(x), it has no kernel for opset 24's Swish.
        return self.down_proj(gate * torch.sigmoid(gate) * up)  # type: ignore[no-any-return]


class DecoderLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: LlamaConfig, attention: Attention) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, attention)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self, x: Tensor, past: KeyValue, places: Sequence[Tensor], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """[N, E] -> [N, E] and the cache after the step."""
        attended, present = self.self_attn(self.input_layernorm(x), past, places, cos, sin)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class LlamaModel(nn.Module):
    """Embedding, layers and last norm: what checkpoints name ``model``."""

    def __init__(self, config: LlamaConfig, attention: Attention) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, attention) for _ in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaDecoder(nn.Module):
    """A Llama from token ids to logits.

    Args:
        config: the model's numbers.
        attention: the dialect.
        prepare: makes what its layers share of the inputs and of one layer's past keys, once.
    """

    rope_cos: Tensor  # [max_positions + MAX_CHUNK, D/2]: a padded chunk may reach past the end
    rope_sin: Tensor

    def __init__(
        self,
        config: LlamaConfig,
        attention: Attention = eager_attention,
        prepare: Prepare | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.prepare = prepare
        self.model = LlamaModel(config, attention)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, table in rope_buffers(config):
            self.register_buffer(name, table)

    def forward(
        self,
        input_ids: Tensor,
        logits_rows: Tensor,
        places: Sequence[Tensor],
        past_key_values: Sequence[KeyValue],
    ) -> tuple[Tensor, list[KeyValue]]:
        """One step, arguments and results in the order of the dialect.

        Args:
            input_ids: int64 [N].
            logits_rows: int64 [R].
            places: the dialect's further inputs.
            past_key_values: each layer's keys and values before the step.

        Returns:
            Logits [R, V], and each layer's keys and values after the step.
        """
        x = self.model.embed_tokens(input_ids)  # [N, E]
        if self.prepare is not None:
            places = self.prepare(places, past_key_values[0][0])
        presents = []
        for layer, past in zip(self.model.layers, past_key_values, strict=True):
            x, present = layer(x, past, places, self.rope_cos, self.rope_sin)
            presents.append(present)
        x = self.model.norm(x.index_select(0, logits_rows))  # [R, E]: the head sees only these
        head = self.model.embed_tokens if self.config.tie_embeddings else self.lm_head
        return F.linear(x, head.weight), presents

    def empty_cache(self, num_slots: int, capacity: int) -> list[KeyValue]:
        """A zero cache of float32 [num_slots, K, capacity, D] for each layer's keys and values."""
        shape = (num_slots, self.config.num_kv_heads, capacity, self.config.head_dim)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.config.num_layers)]


def rope_buffers(config: LlamaConfig) -> Iterable[tuple[str, Tensor]]:
    """The tables that a decoder holds beside its weights, by name."""
    cos, sin = rope_tables(config, config.max_positions + MAX_CHUNK)
    return ("rope_cos", cos), ("rope_sin", sin)


def build_decoder(
    config: LlamaConfig,
    tensors: Iterable[tuple[str, np.ndarray | Tensor]],
    attention: Attention = eager_attention,
) -> LlamaDecoder:
    """A decoder over the given tensors, which are used as they lie (memory-mapped ones too).

    Args:
        config: the model's numbers.
        tensors: every parameter by name, with or without the RoPE tables.
        attention: the dialect.
    """
    with torch.device("meta"):
        decoder = LlamaDecoder(config, attention)
    state = dict(rope_buffers(config))
    for name, tensor in tensors:
        state[name] = tensor if isinstance(tensor, Tensor) else torch.from_numpy(tensor)
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.requires_grad_(False).eval()
