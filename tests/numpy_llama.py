"""A Llama in numpy, written from the published formulas: a reference that shares no code.

One sequence at a time, in float64, without a cache: every token attends to those before it. It
knows nothing of the packages, so it also runs where torch isn't, and reads the weights of a bundle
with the few lines that the safetensors format needs.

Sources: "Llama 2" (Touvron et al., 2023) and its references for RMSNorm, SwiGLU and grouped
attention; "RoFormer" (Su et al., 2021) for RoPE, in the half-split layout of Hugging Face; the
stretched frequencies of Llama 3.1 as its model card's code has them.

T tokens, H query heads, K KV heads, D head dimension, E hidden size, I width of the MLP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class NumpyLlama:
    """From token ids to logits.

    Args:
        config: the model's ``config.json``.
        weights: the parameters by the names of a bundle.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Floats]) -> None:
        self._weights = weights
        self._num_layers: int = config["num_hidden_layers"]
        self._heads: int = config["num_attention_heads"]
        self._kv_heads: int = config["num_key_value_heads"]
        self._eps: float = config["rms_norm_eps"]
        self._frequencies = frequencies(config)

    def logits(self, token_ids: Sequence[int]) -> Floats:
        """The scores [T, V] of the token after each one."""
        embedding = self._weights["model.embed_tokens.weight"]
        x = embedding[list(token_ids)]
        for i in range(self._num_layers):
            layer = f"model.layers.{i}"
            x = x + self._attention(self._norm(x, f"{layer}.input_layernorm"), layer)
            x = x + self._mlp(self._norm(x, f"{layer}.post_attention_layernorm"), layer)
        head = self._weights.get("lm_head.weight", embedding)  # tied if there is none
        return np.asarray(self._norm(x, "model.norm") @ head.T)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], Floats]:
        """The likeliest completion, and the row of logits [num_tokens, V] behind each token."""
        token_ids, rows = list(prompt), []
        for _ in range(num_tokens):
            rows.append(self.logits(token_ids)[-1])
            token_ids.append(int(rows[-1].argmax()))
        return token_ids[len(prompt) :], np.stack(rows)

    def _norm(self, x: Floats, name: str) -> Floats:
        mean_square = np.square(x).mean(axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean_square + self._eps) * self._weights[f"{name}.weight"])

    def _attention(self, x: Floats, layer: str) -> Floats:
        count = len(x)
        packed = x @ self._weights[f"{layer}.self_attn.qkv_proj.weight"].T
        heads = packed.reshape(count, self._heads + 2 * self._kv_heads, -1).swapaxes(0, 1)
        query, key, value = np.split(heads, [self._heads, self._heads + self._kv_heads])
        # Query heads share a key and value head in runs: the first H/K heads have the first.
        group = self._heads // self._kv_heads
        query, (key, value) = self._rotate(query), self._kept(layer, self._rotate(key), value)
        key = key.repeat(group, axis=0)
        scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1])  # [H, T, T]
        scores[:, np.triu(np.ones((count, count), bool), k=1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        attended = shares @ value.repeat(group, axis=0)  # [H, T, D]
        rows = attended.swapaxes(0, 1).reshape(count, -1)
        return np.asarray(rows @ self._weights[f"{layer}.self_attn.o_proj.weight"].T)

    def _kept(self, layer: str, key: Floats, value: Floats) -> tuple[Floats, Floats]:  # noqa: ARG002
        """What attention sees of keys and values [K, T, D]: as they are."""
        return key, value

    def _rotate(self, x: Floats) -> Floats:
        """Turn value j and value j + D/2 of each head [T, D] by position · frequency j."""
        angles = np.arange(x.shape[-2])[:, None] * self._frequencies
        turn = np.exp(1j * angles)
        first, second = np.split(x, 2, axis=-1)
        turned = (first + 1j * second) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def _mlp(self, x: Floats, layer: str) -> Floats:
        gate = x @ self._weights[f"{layer}.mlp.gate_proj.weight"].T
        up = x @ self._weights[f"{layer}.mlp.up_proj.weight"].T
        gated = gate / (1 + np.exp(-gate)) * up
        return np.asarray(gated @ self._weights[f"{layer}.mlp.down_proj.weight"].T)


def frequencies(config: Mapping[str, Any]) -> Floats:
    """Radians per position of each of the D/2 pairs, stretched as ``rope_scaling`` says."""
    dim: int = config["head_dim"]
    plain = config["rope_theta"] ** (-np.arange(0, dim, 2) / dim)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return np.asarray(plain)
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return np.asarray(plain / factor)
    if scaling["rope_type"] != "llama3":
        raise ValueError(f"no formula for rope_type {scaling['rope_type']!r}")
    # Turns within the context of training: few are slowed down, many kept, those between mixed.
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(kept * plain + (1 - kept) * plain / factor)


def read_weights(path: Path) -> dict[str, Floats]:
    """The tensors of a float32 safetensors file, but for the RoPE tables, which are ours to make.

    The file is 8 bytes with the length of a JSON header, the header, then the data.
    """
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    weights = {}
    for name, tensor in json.loads(data[8:start]).items():
        if name == "__metadata__" or name.startswith("rope_"):
            continue
        if tensor["dtype"] != "F32":
            raise ValueError(f"{name} of {path} is {tensor['dtype']}, not F32")
        begin, end = tensor["data_offsets"]
        values = np.frombuffer(data[start + begin : start + end], "<f4")
        weights[name] = values.reshape(tensor["shape"]).astype(np.float64)
    return weights
