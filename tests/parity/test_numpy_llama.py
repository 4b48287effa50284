"""The runtime computes what a Llama in numpy computes, which shares no code with it.

Here on the processor at hand; ``tests/laws/test_old_cpu.py`` has the same on an older one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_decoder.config import RopeScaling
from llama_decoder.tiny import tiny_config, write_huggingface
from llama_export.build import build_bundle
from llama_runtime.backends.ort_cpu import open_session
from llama_runtime.bundle import open_bundle
from llama_runtime.contract import SLOTS
from tests.numpy_llama import NumpyLlama, read_weights
from tests.old_cpu.cases import read_reference, write_requests
from tests.old_cpu.proof import LOGIT_TOLERANCE
from tests.old_cpu.worker import Request, Runner, runtime
from tests.tiny_model import byte_level_tokenizer

LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=32,
)
# With the seed of prompts that have no near ties.
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "2 query heads a KV head, D 32": ({}, 1),
    "1 query head a KV head, D 80, tied, linear": (
        {
            "num_heads": 2,
            "num_kv_heads": 2,
            "head_dim": 80,
            "tie_embeddings": True,
            "rope_scaling": RopeScaling(kind="linear", factor=4.0),
        },
        1,
    ),
    "8 query heads a KV head, D 64, llama3": (
        {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "rope_scaling": LLAMA3},
        0,
    ),
    "odd widths": ({"intermediate_size": 131, "hidden_size": 66}, 1),
}
# SmolLM2-135M's config.json, as published.
SMOLLM2 = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000,
}
REAL_TOLERANCE = 1e-3  # logits of up to 30, after 30 layers in float32


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ragged_job_gives_numpys_logits_and_tokens(shape: str, tmp_path: Path) -> None:
    overrides, seed = SHAPES[shape]
    model, bundle = tmp_path / "model", tmp_path / "bundle"
    model.mkdir()
    write_huggingface(tiny_config(**overrides), model, seed=0)
    byte_level_tokenizer().save(str(model / "tokenizer.json"))
    build_bundle(model, bundle)
    write_requests(tmp_path, read_reference(model, bundle), seed)
    opened = open_bundle(bundle)
    for threads in (1, 2):
        session = open_session(opened.graph_path(SLOTS.name), threads)
        figures = runtime(tmp_path, Runner(opened, session))
        assert figures["max_logit_difference"] <= LOGIT_TOLERANCE
        assert figures["equal_tokens"] == figures["tokens"] >= 50
        assert figures["steps_with_idle_slots"] > 0


def test_the_real_model_gives_numpys_logits(real_bundle: Path) -> None:
    bundle = open_bundle(real_bundle, verify="size")
    runner = Runner(bundle, open_session(bundle.graph_path(SLOTS.name), threads=2))
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, 49_152, n).tolist(), 6) for n in (1, 2, 34, 65)]
    run = runner.run(requests, slots=3)
    reference = NumpyLlama(SMOLLM2, read_weights(real_bundle / "model.safetensors"))
    for request, rows, token_ids in zip(requests, run.rows, run.token_ids, strict=True):
        right = reference.logits(request.prompt + token_ids)[len(request.prompt) - 1 : -1]
        assert np.abs(rows - right).max() <= REAL_TOLERANCE
        # Whatever token the runtime took, numpy's best is at most a near tie better.
        taken = np.take_along_axis(right, np.array(token_ids)[:, None], axis=1)[:, 0]
        assert (right.max(axis=1) - taken).max() <= REAL_TOLERANCE
