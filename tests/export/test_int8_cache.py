"""Keys and values in 8 bits: what the pass makes, and what ONNX Runtime makes of that.

The reference is numpy's: what is stored is the number in steps of its scale, rounded to the
nearest, and attention sees nothing else, not even of the tokens of the step itself.
"""

from __future__ import annotations

import random

import numpy as np
import onnx
import pytest

from llama_decoder.tiny import tiny_config
from llama_export.cache_passes import (
    cache_layout,
    cache_scale_names,
    cache_scales,
)
from llama_export.errors import ExportError
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.chunk import Chunk
from llama_runtime.contract import SLOTS
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.step_batch import StepBatch
from tests.int8_cache import NO_NUMBER, Int8Cached, huggingface_names
from tests.numpy_llama import frequencies

INT8 = onnx.TensorProto.INT8


def test_the_graph_has_int8_caches_and_a_scale_for_each_channel(int8_cached: Int8Cached) -> None:
    graph = onnx.load(int8_cached.graph, load_external_data=False).graph
    config = int8_cached.config
    dialect = SLOTS.typed("float32", "int8")
    caches = {
        spec.name for spec in (*dialect.cache_inputs(config.num_layers), *dialect.cache_outputs(2))
    }
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert {name for name, kind in types.items() if kind == INT8} == caches
    layout = cache_layout(config)
    stored = {t.name: tuple(t.dims) for t in graph.initializer if t.name.endswith("_scale")}
    assert stored == dict.fromkeys(layout, (2 * 64,))
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == config.num_layers
    for layer, node in enumerate(nodes):
        assert tuple(node.input[12:14]) == cache_scale_names(layer)
        attributes = {a.name: a.s or a.i for a in node.attribute}
        assert (
            attributes.items()
            >= {
                "k_quant_type": b"PER_CHANNEL",
                "v_quant_type": b"PER_CHANNEL",
                "kv_cache_bit_width": 8,
            }.items()
        )


class Played:
    """Runs random chunks of three sequences, and keeps the logits of each last row."""

    def __init__(self, model: Int8Cached, threads: int) -> None:
        geometry = model.config.geometry
        choose = random.Random(1)
        session = open_session(model.graph, threads)
        self.backend = OrtCpu(session, geometry, num_slots=3, capacity=160, cache_dtype="int8")
        batch = StepBatch(3, 160, self.backend.row_multiple)
        self.seqs = [
            Sequence(slot, [], 0, SamplingParams(), 0, None, slot=slot)  # type: ignore[arg-type]
            for slot in range(3)
        ]
        self.logits: list[tuple[list[int], np.ndarray]] = []
        for sizes in ((33, 0, 1), (1, 1, 1), (0, 40, 7), (1, 0, 2), (1, 1, 1), (20, 1, 0)):
            chunks = []
            for seq, size in zip(self.seqs, sizes, strict=True):
                seq.token_ids += choose.choices(range(NO_NUMBER), k=size)
                chunks += [Chunk(seq, size)] if size else []
            logits = self.backend.run(batch.build(chunks))
            for chunk, row in zip(chunks, logits, strict=False):
                self.logits.append((list(chunk.seq.token_ids), row.copy()))
                chunk.seq.cache_len += chunk.num_tokens


@pytest.fixture(scope="module", params=[1, 2], ids=lambda n: f"{n} threads")
def played(request: pytest.FixtureRequest, int8_cached: Int8Cached) -> Played:
    return Played(int8_cached, request.param)


def test_what_is_stored_is_the_number_in_steps_of_its_scale(
    played: Played, int8_cached: Int8Cached
) -> None:
    """Both ends of the range are used: other text than that of the scales is cut off there."""
    seen, close = [], 0
    for seq in played.seqs:
        int8_cached.reference.logits(seq.token_ids)
        # A first layer's: those of the next ones rest on sums in another order.
        for part, steps in enumerate(int8_cached.reference.steps["model.layers.0"]):
            stored = played.backend._cache[part][seq.slot, :, : seq.num_tokens]
            difference = np.abs(np.clip(steps, -128, 127) - stored)
            assert difference.max() <= 0.5 + 1e-3
            seen.append(stored.ravel())
            close += int((difference > 0.499).sum())
    assert close < 0.01 * sum(map(len, seen))
    assert (np.concatenate(seen).min(), np.concatenate(seen).max()) == (-128, 127)
    assert not played.backend._cache[0][0, :, played.seqs[0].num_tokens :].any()


def test_attention_sees_what_is_stored_and_nothing_else(
    played: Played, int8_cached: Int8Cached
) -> None:
    """A tenth of what the 8 bits themselves cost is what is left of sums in another order."""
    errors, losses = [], []
    for token_ids, row in played.logits:
        expected = int8_cached.reference.logits(token_ids)[-1]
        errors.append(np.abs(row - expected).max())
        losses.append(np.abs(int8_cached.exact.logits(token_ids)[-1] - expected).max())
    assert len(errors) == 14
    assert np.median(losses) > 0.005
    assert np.median(errors) < 0.01 * np.median(losses)
    assert max(errors) < 0.5 * max(losses)


# --- scales -------------------------------------------------------------------------------------


def test_the_scale_of_a_value_reaches_as_far_as_the_text_did() -> None:
    peaks = np.linspace(1, 64, 64, dtype=np.float32)
    scales = dict(cache_scales(tiny_config(), 1, peaks[::-1].copy(), peaks))
    assert tuple(scales) == cache_scale_names(1)
    found = scales[cache_scale_names(1)[1]]
    assert found.dtype == np.float32
    ratio = 127 * found / peaks
    assert 0.999 <= ratio.min() <= ratio.max() <= 1.5
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)


def test_no_key_is_cut_off_at_a_position_that_the_text_did_not_reach() -> None:
    """RoPE only turns pairs of channels, so the length of a pair at one position bounds it at all.

    The text here is one token.
    """
    config = tiny_config()
    key = np.random.default_rng(0).standard_normal((config.num_kv_heads, config.head_dim))
    peaks = np.abs(key).ravel().astype(np.float32)
    scales, of_values = dict(cache_scales(config, 0, peaks, peaks)).values()
    assert not np.allclose(scales, of_values)
    angles = np.arange(0, 5000, 7)[:, None] * frequencies(huggingface_names(config))
    first, second = np.split(key[:, None], 2, axis=2)
    turned = (first + 1j * second) * np.exp(1j * angles)  # [K, positions, D/2]
    steps = np.concatenate([turned.real, turned.imag], axis=2) / scales.reshape(len(key), 1, -1)
    assert 120 < np.abs(steps).max() <= 127.01
    assert (np.abs(steps).max(axis=1) > 50).mean() > 0.8, "and no scale is wasted"


def test_a_channel_that_the_text_left_at_0_has_a_scale_too() -> None:
    config = tiny_config(num_kv_heads=1)
    peaks = np.full(32, 4.0, np.float32)
    peaks[5] = 0
    zeros = np.zeros(32, np.float32)
    keys, values = dict(cache_scales(config, 0, zeros, peaks)).values()
    assert np.isfinite(1 / keys).all()
    assert 0 < values[5] < 0.01 * values[6]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_magnitudes_that_are_none_name_the_tensor(bad: float) -> None:
    peaks = np.ones(64, np.float32)
    values = peaks.copy()
    values[7] = bad
    with pytest.raises(ExportError, match=r"layers\.1\.self_attn\.v_scale can't be made: a magnit"):
        dict(cache_scales(tiny_config(), 1, peaks, values))


def test_magnitudes_of_another_model_are_refused() -> None:
    with pytest.raises(ExportError, match=r"k_scale can't be made from magnitudes of the shape"):
        dict(cache_scales(tiny_config(), 0, np.ones(63, np.float32), np.ones(64, np.float32)))


def test_a_head_dimension_that_the_operator_refuses_is_refused_first() -> None:
    with pytest.raises(ExportError, match="dimension of 40, and an int8 cache needs a multiple of"):
        cache_layout(tiny_config(head_dim=40))
