"""Turning a model so that no channel of its activations is much larger than the others.

Few channels of a Llama's hidden states are tens of times as large as the rest, and a row's scale
that holds them leaves few of its 255 steps to the others. But channels are a matter of choice:
with an orthogonal Q, whatever writes to the residual stream may write x Q, and whatever reads it
read that with W Q, since x Q (W Q)^T is x W^T. RMSNorm divides by the same root either way once its
weight is a factor of what reads it. Turned by a matrix whose entries all have about the same
magnitude, every channel holds a bit of every other one, and a row looks like normal noise (QuaRot,
arXiv 2404.00456). It costs nothing but in two places:

- The rows that go into down come out of a product of two vectors, which isn't linear: they are
  turned in the graph, each 64 of them by a Hadamard matrix.
- A head that is the embedding too has no columns of its own for the last norm's weight, so its rows
  are multiplied with a matrix that is as good as that weight (``Rotation.head``).

Heads' values are turned as well, and with them what o reads. Keys and queries are not: RoPE is in
between.

After a norm, a turned row has a root mean square of 1 and about normal values. So its scale needn't
be looked for: all such rows share the one that is best for normal values (``NORM_LIMIT``).
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from llama_decoder.config import LlamaConfig
from llama_export.quantise.codes import INT8_LIMIT
from llama_export.quantise.layers import Layer

FACTOR = 64  # the largest Hadamard matrix that is multiplied with: 16 KB, within any cache
# Where 127 steps end in a row that comes out of a norm; what is beyond is cut off. Of all limits
# this leaves the least squared error in normal values: a wider one makes the steps coarser.
NORM_LIMIT = 3.9
NORM_STEP = NORM_LIMIT / INT8_LIMIT


def hadamard(size: int) -> Tensor:
    """The symmetric orthogonal matrix of a power of two whose entries all have one magnitude."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / sqrt(size)


def inner_block(columns: int) -> int:
    """How many neighbours are turned together where so many go into down; 1 for none."""
    return min(_power_of_two(columns), FACTOR)


def turn_blocks(rows: Tensor) -> Tensor:
    """What goes into down, [..., I], turned as the graph does it. Turned twice it is as before."""
    block = inner_block(rows.shape[-1])
    return (rows.view(*rows.shape[:-1], -1, block) @ hadamard(block)).flatten(-2)


class Rotation:
    """How a model is turned.

    Args:
        config: the model's numbers.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self._config = config
        self._residual = _Turn(config.hidden_size)
        self._values = _Turn(config.head_dim)

    def table(self, rows: Tensor, norm: Tensor | None = None) -> Tensor:
        """Embedding, or a head of its own with the weight of the norm before it.

        Args:
            rows: [V, E].
            norm: [E]; None for the embedding.
        """
        return self._residual.columns(rows if norm is None else rows * norm)

    def layer(self, layer: Layer) -> None:
        """Turn a layer, in place; the weights of its norms become 1.

        A plain decoder computes with it what it did, but for two things: hidden states are turned,
        and down expects its rows as ``turn_blocks`` has them.
        """
        size = self._config.hidden_size
        layer.qkv = self._residual.columns(layer.qkv * layer.input_norm)
        layer.gate = self._residual.columns(layer.gate * layer.post_norm)
        layer.up = self._residual.columns(layer.up * layer.post_norm)
        layer.input_norm, layer.post_norm = torch.ones(size), torch.ones(size)
        dim, kv_heads = self._config.head_dim, self._config.num_kv_heads
        values = layer.qkv[-kv_heads * dim :].view(kv_heads, dim, size)
        values.copy_(self._values.columns(values.mT).mT)
        o = self._values.columns(layer.o.view(size, -1, dim)).flatten(1)
        layer.o = self._residual.columns(o.T).T.contiguous()
        layer.down = self._residual.columns(turn_blocks(layer.down).T).T.contiguous()

    def head(self, norm: Tensor) -> Tensor:
        """What rows are multiplied with, [E, E], that go into a head that is the turned embedding.

        x norm E^T is (x Q) (Q^T norm Q) (E Q)^T: turned back, multiplied, and turned again.

        Args:
            norm: the last norm's weight, [E].
        """
        return self._residual.columns(self._residual.columns(torch.diag(norm)).T)


class _Turn:
    """One orthogonal matrix Q, never made: signs, then a product of small ones (Kronecker's).

    Args:
        size: of the matrix.
    """

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(size)
        self._signs = 1 - 2 * torch.randint(2, (size,), generator=generator).float()
        power = _power_of_two(size)
        self._factors = [] if power == size else [_cosines(size // power)]
        while power > 1:
            self._factors.append(hadamard(min(power, FACTOR)))
            power //= len(self._factors[-1])

    def columns(self, rows: Tensor) -> Tensor:
        """Rows [..., K] times Q."""
        turned, size = rows * self._signs, len(self._signs)
        for factor in self._factors:
            parts = turned.reshape(-1, size // len(factor), len(factor)) @ factor
            turned = parts.mT.reshape(-1, size)  # so that the next factor finds its own axis last
        return turned.reshape(rows.shape)


def _power_of_two(size: int) -> int:
    """The largest that divides it."""
    return size & -size


def _cosines(size: int) -> Tensor:
    """The orthogonal matrix of a cosine transform, for sizes that have no Hadamard matrix."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(torch.pi / size * (places + 0.5) * places[:, None]) * sqrt(2 / size)
    matrix[0] /= sqrt(2)
    return matrix.float()
