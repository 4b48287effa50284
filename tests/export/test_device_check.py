"""What a GPU computes against the decoder: the comparison itself, with a stand-in for the GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llama_decoder.decoder import rope_buffers
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.device_check import MAX_TOKENS, PROMPT_LENGTHS, DeviceCheck, check_engine
from llama_export.errors import ExportError
from llama_export.precisions import TENSORRT_CHECK, TENSORRT_PRECISIONS
from llama_export.weight_file import write_weights
from tests.recorded_engine import VOCAB_SIZE, Model, Recorded

CONFIG = tiny_config(vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


def check(model: Model, weights: Path) -> DeviceCheck:
    recorded = Recorded(model, end_tokens=frozenset())
    precision = TENSORRT_PRECISIONS["fp16"]  # whose limits a GPU has to keep
    return check_engine(recorded.engine, "a stand-in", weights, CONFIG, precision)


def test_what_computes_the_model_passes(model: Model) -> None:
    found = check(model, model.graph.with_name("model.safetensors"))
    assert found.passed
    assert found.device_rows == (len(PROMPT_LENGTHS) + 2) * MAX_TOKENS
    assert found.device_max_divergence < 1e-6
    assert "a stand-in" in found.summary()
    found.require_passed()


def test_what_computes_another_does_not(model: Model, tmp_path: Path) -> None:
    """One row of one matrix differs."""
    weights = random_weights(CONFIG, 0)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][3] += np.float32(0.5)
    tables = [(table, values.numpy()) for table, values in rope_buffers(CONFIG)]
    path = tmp_path / "model.safetensors"
    for _ in write_weights(path, TENSORRT_CHECK.layout(CONFIG), [*weights.items(), *tables]):
        pass
    found = check(model, path)
    assert not found.passed
    assert found.device_max_divergence > 1e-3
    with pytest.raises(ExportError, match="does not compute what the model does"):
        found.require_passed()
