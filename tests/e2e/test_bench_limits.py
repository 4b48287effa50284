"""Shares of the machine's limits are counted right; the machine's own figures are not judged."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llama_decoder.shapes import SHAPES
from llama_decoder.weights import parameter_shapes
from llama_runtime.bench.work import stored, weight_bytes
from llama_runtime.bundle import open_bundle
from llama_runtime.contract import Geometry
from scripts import bench_limits_machine
from scripts.bench_limits import limit, shares
from scripts.bench_limits_machine import float_product, multipliers, readers
from scripts.bench_limits_memory import held
from scripts.bench_limits_steps import PROMPT_TOKENS, STEPS, WARM_STEPS, Decoders, Round
from scripts.bench_limits_work import cache_bytes, multiply_adds, weight_file

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-3.1-8B"])
def test_a_token_is_multiplied_with_every_matrix_once(name: str) -> None:
    config = SHAPES[name]
    geometry = Geometry(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
    )
    matrices = {k: v for k, v in parameter_shapes(config).items() if len(v) == 2}
    if not config.tie_embeddings:
        del matrices["model.embed_tokens.weight"]
    numbers = sum(rows * columns for rows, columns in matrices.values())
    assert multiply_adds(geometry, 3) == 3 * numbers


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_all_but_the_rows_that_nobody_looks_up(tmp_path: Path, tied: bool) -> None:
    vocab_size, hidden = 100, 8
    tensors: dict[str, np.ndarray] = {
        "model.embed_tokens.weight.codes": np.zeros((vocab_size, hidden), np.int8),
        "model.embed_tokens.weight.scales": np.zeros(vocab_size, np.float32),
        "model.layers.0.mlp.up_proj.weight.codes": np.zeros((hidden, 16), np.int8),
        "model.norm.weight": np.zeros(hidden, np.float32),
        "rope_cos": np.zeros((50, 2), np.float32),
        "rope_sin": np.zeros((50, 2), np.float32),
    }
    if tied:
        tensors["model.embed_tokens.weight.column_scales"] = np.zeros(hidden, np.float32)
    else:
        tensors["lm_head.weight.codes"] = np.zeros((hidden, vocab_size), np.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    entries = stored(tmp_path / "model.safetensors")
    assert {name: size for name, (_, size) in entries.items()} == {
        name: tensor.nbytes for name, tensor in tensors.items()
    }
    batch = 3
    row = hidden + 4  # of the embedding, with its scale
    rope = 2 * batch * 2 * 4
    head = vocab_size * hidden
    embedding = vocab_size * row + hidden * 4 if tied else batch * row + head
    assert weight_bytes(entries, batch) == embedding + hidden * 16 + hidden * 4 + rope


def test_the_limit_is_the_way_that_is_best_most_of_the_time() -> None:
    found = limit({"lucky": [1.0, 9.0, 1.0], "steady": [3.0, 2.0, 4.0]})
    assert (found["best"], found["per_s"]) == ("steady", 3.0)


def test_a_share_is_the_median_of_the_rounds_own() -> None:
    rounds = [
        Round(graph_s=s, step_s=2 * s, fastest_s=s / 2, num_bytes=12.0, operations=60)
        for s in (1.0, 2.0, 3.0)
    ]
    limits = {
        "bandwidth": limit({"a": [24.0, 12.0, 8.0]}),
        "byte_rate": limit({"a": [100.0, 100.0, 100.0], "b": [1.0, 1.0, 1.0]}),
    }
    found = shares(rounds, limits, batch=8)
    assert found["graph"]["bandwidth"] == 0.5
    assert (found["graph"]["bandwidth_low"], found["graph"]["bandwidth_high"]) == (0.5, 0.5)
    assert found["graph"]["byte_rate"] == 0.3
    assert (found["graph"]["byte_rate_low"], found["graph"]["byte_rate_high"]) == (0.2, 0.6)
    assert found["step"]["byte_rate"] == 0.15
    assert found["fastest"]["byte_rate"] == 0.6
    assert (found["step"]["ms"], found["tokens_per_s"]) == (4000.0, 2.0)


@pytest.fixture
def decoders(tiny_bundle: Path) -> Iterator[Decoders]:
    found = Decoders(tiny_bundle, threads=1, batches=[1, 3])
    yield found
    found.close()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_round_times_steps_of_all_sequences(
    decoders: Decoders, tiny_bundle: Path, batch: int
) -> None:
    for _ in range(2):  # the second finds the cache as the first left it
        found = decoders.round(batch)
        assert 0 < found.fastest_s <= found.graph_s < found.step_s
    bundle = open_bundle(tiny_bundle)
    weights = weight_bytes(stored(weight_file(bundle)), batch)
    tokens = (found.num_bytes - weights) / cache_bytes(bundle, 1)
    # The newest of the first step reads the prompt, the sampled token and those of warm steps.
    assert tokens >= batch * (PROMPT_TOKENS + 1 + WARM_STEPS + (STEPS - 1) / 2)
    assert tokens <= batch * (PROMPT_TOKENS + 1 + WARM_STEPS + (STEPS - 1) / 2 + batch)
    if batch == 1:
        assert tokens == PROMPT_TOKENS + 1 + WARM_STEPS + (STEPS - 1) / 2


def test_ways_compute_what_they_are_timed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_limits_machine, "READ_BYTES", 2**22)
    monkeypatch.setattr(bench_limits_machine, "SHAPES", ((4, 64, 32),))
    monkeypatch.setattr(bench_limits_machine, "FLOAT_SHAPE", (4, 64, 32))
    for threads in (1, 3):
        ways = {**readers(threads), **multipliers(threads), "float": float_product(threads)}
        assert len(ways) == 6
        for name, way in ways.items():
            assert way() > 0, name


def test_held_memory_is_what_a_process_takes() -> None:
    before = held()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # nothing that the allocator has kept
    block = np.frombuffer(mmap.mmap(-1, 2**27, flags=private), np.uint8)
    block[:] = 1
    after = held()
    assert after["own"] - before["own"] >= 0.9 * block.nbytes
    del block
    gone = held()
    assert gone["own"] <= before["own"] + 0.1 * 2**25
    assert gone["peak"] >= before["resident"] + 0.9 * 2**25


def test_a_full_bundle_is_measured_in_a_process_of_its_own(tiny_bundle: Path) -> None:
    result = run("scripts.bench_limits_memory", str(tiny_bundle), "--slots", "2", "--max-len", "40")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    geometry = open_bundle(tiny_bundle).manifest.geometry
    numbers = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim
    assert found["cache"] == 4 * numbers * 2 * 40
    assert found["weights"] == (tiny_bundle / "model.safetensors").stat().st_size
    assert found["peak_loading"] <= found["peak"]
    assert found["ratio"] == found["peak"] / (found["weights"] + found["cache"])
    assert found["own_ratio"] == found["filled"]["own"] / (found["weights"] + found["cache"])
    assert found["own_ratio"] <= found["ratio"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["--rounds", "0"],
        ["--threads", "0"],
        ["--only", "nonsense"],
        ["--bundle", "fp16=/tmp"],
        ["--bundle", "int4"],
        ["--bundle", "int8=/nowhere"],
    ],
)
def test_wrong_use_is_said(wrong: list[str]) -> None:
    result = run("scripts.bench_limits", *wrong)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
