"""The largest keys and values of a model that isn't rounded, against numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from llama_decoder.tiny import random_weights, tiny_config
from llama_export.errors import ExportError
from llama_export.quantise.cache_maxima import cache_maxima
from tests.int8_cache import WatchedLlama, huggingface_names


def test_maxima_are_those_of_every_window() -> None:
    config = tiny_config()
    weights = random_weights(config, seed=2)
    windows = np.random.default_rng(1).integers(0, config.vocab_size, (64, 64))
    numbers = {name: array.astype(np.float64) for name, array in weights.items()}
    reference = WatchedLlama(huggingface_names(config), numbers)
    for window in windows:
        reference.logits(window.tolist())
    found = dict(cache_maxima(config, iter(weights.items()), windows))
    assert list(found) == [0, 1]
    for index, (keys, values) in found.items():
        expected = reference.peaks[f"model.layers.{index}"]
        np.testing.assert_allclose(keys, expected[0].ravel(), rtol=1e-4)
        np.testing.assert_allclose(values, expected[1].ravel(), rtol=1e-4)


def test_a_text_that_is_too_short_is_refused_with_the_numbers() -> None:
    config = tiny_config()
    weights = random_weights(config, seed=2)
    with pytest.raises(ExportError, match=r"64 tokens in whole windows, and .* needs 4,096"):
        list(cache_maxima(config, iter(weights.items()), np.zeros((1, 64), np.int64)))
