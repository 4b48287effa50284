"""What is counted of a run, and graphs that are written without the package onnx."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from llama_runtime.bench import limits, peak_memory
from llama_runtime.bench.onnx_bytes import byte_product, float_product, half_product
from llama_runtime.bench.work import Work, parameters, stored, weight_bytes
from llama_runtime.bundle import open_bundle
from llama_runtime.contract import Geometry
from llama_runtime.slots_precision import slots_cache_dtype

SMOLLM2_135M = Geometry(
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
    max_positions=8192,
)
PARAMETERS = 134_515_008  # as its makers count them, embedding and head as one
NORMS = (2 * 30 + 1) * 576


def ran(model: bytes, left: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(onnx.load_model_from_string(model), full_check=True)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"a": left})
    return np.asarray(found)


def test_products_written_by_hand_are_right() -> None:
    numbers = np.random.default_rng(0)
    matrix = numbers.standard_normal((130, 5)).astype(np.float32)
    left = numbers.standard_normal((3, 130)).astype(np.float32)
    assert np.allclose(ran(float_product(3, matrix), left), left @ matrix, atol=1e-4)
    halves, left16 = matrix.astype(np.float16), left.astype(np.float16)
    assert np.allclose(ran(half_product(3, halves), left16), left16 @ halves, atol=0.5)
    codes = numbers.integers(-60, 60, (130, 5), np.int8)
    whole = numbers.integers(0, 100, (3, 130), np.uint8)
    exact = whole.astype(np.int32) @ codes.astype(np.int32)
    assert np.array_equal(ran(byte_product(3, codes), whole), exact)


def test_parameters_are_those_that_the_makers_count() -> None:
    layers, head = parameters(SMOLLM2_135M)
    assert layers + head + NORMS == PARAMETERS


def test_limits_are_measured_and_chosen_by_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 2**20)
    monkeypatch.setattr(limits, "SHAPES", ((2, 8, 16),))
    found = limits.measure(1)
    assert min(found.bandwidth, *found.rates.values()) > 0
    kinds = [found.kind_of(precision) for precision in ("int8", "int4", "fp32")]
    assert kinds == ["bytes", "bytes", "float32"]
    assert found.rates.keys() == set(kinds)
    device = limits.Limits(1.0, {"float16": 1.0})
    assert {device.kind_of(precision) for precision in ("fp16", "bf16", "int4")} == {"float16"}


def test_the_tiny_bundles_work_is_counted_by_hand(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    work, g = Work(bundle, slots_cache_dtype(bundle)), bundle.manifest.geometry
    lengths = [(10, 3), (5, 1)]  # tokens computed: 12 and 5; drawn: 3 and 1
    layers, head = parameters(g)
    assert work.operations(lengths) == 2 * (17 * layers + 4 * head)
    (weights,) = tiny_bundle.glob("*.safetensors")
    entries = stored(weights)
    token = 4 * 2 * g.num_layers * g.num_kv_heads * g.head_dim
    seen = 11 + 12  # each decoded token reads the keys and values up to its own
    steps = 4
    assert work.read_bytes(lengths, steps) == round(
        steps * weight_bytes(entries, 17 / steps) + seen * token
    )


def test_tables_count_a_row_a_token_and_matrices_as_a_whole(tmp_path: Path) -> None:
    tensors = {
        "rope_cos": ([100, 4], 1600),
        "model.embed_tokens.weight": ([50, 8], 1600),
        "lm_head.weight": ([50, 8], 1600),
        "model.norm.weight": ([8], 32),
    }
    header, at = {"__metadata__": {"format": "pt"}}, 0
    entries: dict[str, object] = dict(header)
    for name, (shape, size) in tensors.items():
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert weight_bytes(stored(path), 2) == 2 * 16 + 2 * 32 + 1600 + 32
    tied = {name: entry for name, entry in stored(path).items() if name != "lm_head.weight"}
    assert weight_bytes(tied, 2) == 2 * 16 + 1600 + 32  # the embedding is the head


def test_memory_that_was_held_shows_in_the_peak() -> None:
    peak_memory.reset()
    before = peak_memory.peak_bytes()
    with mmap.mmap(-1, 2**27) as held:  # nothing that the allocator has kept
        np.frombuffer(held, np.uint8)[:] = 1
    after = peak_memory.peak_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 2**26
