"""Moving scale from activations, whose outliers cost the most, into weights.

A product x W^T is the same with x / s and W * s, for any s above 0 a column. Where something linear
makes x, 1/s goes into that, so nothing is added to the graph and the floats stay what they were:
into a norm's weight (for q, k, v and for gate and up), into the rows of up (for down), and into the
rows of v (for o; the query heads of a group share them).

The scales are SmoothQuant's (arXiv 2211.10438): size of the activations to the power a over size of
the weights to the power 1 - a, for several sizes and powers, and the best of them made better by
``_balanced``. What is taken is what leaves the least error in the product's results on some rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_decoder.config import LlamaConfig
from llama_export.quantise.layers import Layer

POWERS = (0.2, 0.35, 0.5, 0.65, 0.8)  # beside these, no migration at all
SEEN_TOKENS = 8192  # of the calibration text, whose largest activations count
SAMPLE_ROWS = 512  # of these, on which errors are compared
EXTREME_ROWS = 16  # and those with the largest values, of every few windows
_SAMPLE_CHANNELS = 1024  # of a product's results, likewise
_RANGE = 1e4  # of the largest scale to the smallest
_STEPS, _STEP, _SHARPNESS = 40, 0.3, 8  # of ``_balanced``

Rounded = Callable[[Tensor], Tensor]


class Inputs(NamedTuple):
    """What goes into a product on the calibration text.

    Attributes:
        peaks: the largest magnitude in each column, float32 [K].
        rows: some of the rows, float32 [T, K].
    """

    peaks: Tensor
    rows: Tensor


class LayerInputs(NamedTuple):
    """The inputs of a layer's products."""

    qkv: Inputs
    o: Inputs
    gate_up: Inputs
    down: Inputs


def smooth(
    config: LlamaConfig, layer: Layer, inputs: LayerInputs, activations: Rounded, weights: Rounded
) -> None:
    """Migrate scale over all four links of a layer, in place.

    Args:
        config: the model's numbers.
        layer: its parameters change; what it computes doesn't.
        inputs: of its products, as they are before.
        activations: rounding of activations [T, K].
        weights: rounding of weights [N, K].
    """
    scales = best_scales(inputs.qkv, [layer.qkv], activations, weights)
    scale_norm(layer.input_norm, [layer.qkv], scales)
    group = config.num_heads // config.num_kv_heads
    scales = best_scales(inputs.o, [layer.o], activations, weights, (group, config.head_dim))
    scale_values(config, layer, scales)
    scales = best_scales(inputs.gate_up, [layer.gate, layer.up], activations, weights)
    scale_norm(layer.post_norm, [layer.gate, layer.up], scales)
    scale_up(layer, best_scales(inputs.down, [layer.down], activations, weights))


def best_scales(
    inputs: Inputs,
    products: Sequence[Tensor],
    activations: Rounded,
    weights: Rounded,
    shared: tuple[int, int] = (1, 1),
) -> Tensor:
    """The scales s with the least error over the sampled rows.

    Args:
        inputs: of the products.
        products: [N, K] each.
        activations: rounding of activations.
        weights: rounding of weights.
        shared: of an o product, query heads of a group and D.

    Returns:
        float32 [K], or [K / group] where a group shares them.
    """
    sampled = [w[:: -(-len(w) // _SAMPLE_CHANNELS)] for w in products]
    wanted = [inputs.rows @ w.T for w in sampled]

    def error(scales: Tensor) -> float:
        columns = _of_heads(scales, shared)
        rows = activations(inputs.rows / columns)
        return sum(
            F.mse_loss(rows @ weights(w * columns).T, result, reduction="sum").item()
            for w, result in zip(sampled, wanted, strict=True)
        )

    strongest = _of_group(torch.cat(sampled).abs().amax(0), shared)
    candidates = [torch.ones_like(strongest)]
    for sizes in _sizes(inputs):
        of_group = _of_group(sizes, shared)
        candidates += [_candidate(of_group, strongest, power) for power in POWERS]
    best = min(candidates, key=error)
    return min(best, _balanced(best, inputs.rows, torch.cat(sampled), shared), key=error)


def scale_norm(norm: Tensor, products: Sequence[Tensor], scales: Tensor) -> None:
    """Divide what a norm gives out by scales [E], and make up for it in its products [N, E]."""
    norm.div_(scales)
    for weights in products:
        weights.mul_(scales)


def scale_up(layer: Layer, scales: Tensor) -> None:
    """Divide what up gives out by scales [I], and make up for it in down."""
    layer.up.div_(scales[:, None])
    layer.down.mul_(scales)


def scale_values(config: LlamaConfig, layer: Layer, scales: Tensor) -> None:
    """Divide the values of the cache by scales [K·D], and make up for it in o."""
    layer.qkv[-len(scales) :].div_(scales[:, None])
    group = config.num_heads // config.num_kv_heads
    layer.o.mul_(_of_heads(scales, (group, config.head_dim)))


def _sizes(inputs: Inputs) -> list[Tensor]:
    """Three opinions on how large a column is, [K] each.

    The largest value; the root of the mean square; and the fourth root of the mean fourth power of
    the share that a value has of the largest one in its row, which is what rounding by rows feels.
    """
    rows = inputs.rows
    shares = rows / rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo().tiny)
    return [inputs.peaks, rows.square().mean(0).sqrt_(), shares.pow(4).mean(0).pow(0.25)]


def _candidate(sizes: Tensor, peaks: Tensor, power: float) -> Tensor:
    """Scales around 1; 1 for columns that are always 0, in the activations or the weights."""
    alive = (sizes > 0) & (peaks > 0)
    logs = torch.where(alive, power * sizes.log() - (1 - power) * peaks.log(), torch.nan)
    logs = (logs - logs.nanmean()).nan_to_num(0.0)
    return logs.exp().clamp_(_RANGE**-0.5, _RANGE**0.5)


def _balanced(scales: Tensor, rows: Tensor, weights: Tensor, shared: tuple[int, int]) -> Tensor:
    """Goes downhill from some scales.

    Rounding with a scale a row adds noise in proportion to the row's largest value, so the error is
    about sum_t max_k (x_tk / s_k)^2 * sum_k s_k^2 |w_k|^2 from the activations, and from the
    weights the same with x and w, s and 1/s exchanged. Where it is least, a column causes as much
    of the noise (by being the largest) as it passes on.

    Args:
        scales: where to begin, as of ``best_scales``.
        rows: [T, K].
        weights: [N, K].
        shared: as of ``best_scales``.
    """
    logs = scales.log()
    alive = _summed((rows.abs().amax(0) > 0) & (weights.abs().amax(0) > 0), shared) > 0
    for _ in range(_STEPS):
        columns = _of_heads(logs.exp(), shared)
        left, right = rows / columns, weights * columns
        noise_x, causes_x = _noise(left)
        noise_w, causes_w = _noise(right)
        passes_x, passes_w = right.square().sum(0), left.square().sum(0)
        share = noise_x * passes_x.sum() / (noise_x * passes_x.sum() + noise_w * passes_w.sum())
        up = share * causes_x + (1 - share) * passes_w / passes_w.sum()
        down = share * passes_x / passes_x.sum() + (1 - share) * causes_w
        up, down = _summed(up, shared), _summed(down, shared)
        logs += torch.where(alive, _STEP * (up - down) / (up + down), 0.0)
    logs = torch.where(alive, logs - logs[alive].mean(), logs)
    return logs.exp().clamp_(_RANGE**-0.5, _RANGE**0.5)


def _noise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the squares of the rows' largest values, and each column's share in being it.

    So that the share is no leap, a value close to the largest has some of it.
    """
    magnitudes = rows.abs()
    largest = magnitudes.amax(1, keepdim=True).clamp_(min=torch.finfo().tiny)
    part = magnitudes.div_(largest).pow_(_SHARPNESS)
    part /= part.sum(1, keepdim=True).clamp_(min=torch.finfo().tiny)
    power = largest.square_()
    return power.sum(), (part * power).sum(0) / power.sum()


def _summed(columns: Tensor, shared: tuple[int, int]) -> Tensor:
    """Over the columns that share a scale."""
    group, dim = shared
    return columns.view(-1, group, dim).sum(1).flatten()


def _of_group(columns: Tensor, shared: tuple[int, int]) -> Tensor:
    """The largest of the columns that share a scale."""
    group, dim = shared
    return columns.view(-1, group, dim).amax(1).flatten()


def _of_heads(scales: Tensor, shared: tuple[int, int]) -> Tensor:
    """Each column's scale."""
    group, dim = shared
    return scales.view(-1, 1, dim).expand(-1, group, dim).flatten()
