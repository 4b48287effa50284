"""What a precision costs is measured on the decoder itself, in the space of one layer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import build_decoder, rope_buffers
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.errors import ExportError
from llama_export.precisions import CUDA_PRECISIONS
from llama_export.weights_cost import compare_logits, streamed_logits

PROMPTS = [[5, 300, 7], [9], [1, 2, 3, 4, 5, 6]]
FP16 = CUDA_PRECISIONS["fp16"]


def tensors(config: LlamaConfig) -> dict[str, torch.Tensor]:
    return {n: torch.from_numpy(w) for n, w in random_weights(config, seed=1).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_streamed_logits_are_those_of_the_decoder(tied: bool) -> None:
    config = tiny_config(tie_embeddings=tied, num_layers=3)
    tables = dict(rope_buffers(config))
    counts: list[int] = []
    with torch.no_grad():
        logits = streamed_logits(config, tensors(config).items(), tables, PROMPTS, counts.append)
    decoder = build_decoder(config, tensors(config).items())
    assert counts[-1] == len(tensors(config))
    row = 0
    for prompt in PROMPTS:
        ids = torch.tensor(prompt)
        count = len(prompt)
        places = (
            torch.arange(count)[None],
            torch.arange(count),
            torch.tensor([count - 1], dtype=torch.int32),
            torch.tensor([count], dtype=torch.int32),
            torch.tensor(count, dtype=torch.int32),
        )
        cache = decoder.empty_cache(1, count)
        expected, _ = decoder(ids, torch.arange(count), places, cache)
        got = logits[row : row + count]
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-4)
        row += count
    assert row == len(logits)


def test_one_layer_is_in_memory_at_a_time() -> None:
    config = tiny_config(num_layers=6)
    alive: list[weakref.ref[np.ndarray]] = []  # what the tensors' memory belongs to
    most = 0

    def given() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for name, value in random_weights(config, seed=0).items():
            memory = value.copy()
            alive.append(weakref.ref(memory))
            most = max(most, sum(ref() is not None for ref in alive))
            tensor = torch.from_numpy(memory)
            del memory
            yield name, tensor
            del tensor

    with torch.no_grad():
        streamed_logits(config, given(), dict(rope_buffers(config)), PROMPTS)
    assert most <= 7  # of 39: those of a layer, and one


def test_parameters_in_another_order_are_refused() -> None:
    config = tiny_config()
    weights = list(reversed(tensors(config).items()))
    with pytest.raises(ExportError, match=r"expected the weights model\.embed_tokens"):
        streamed_logits(config, weights, dict(rope_buffers(config)), PROMPTS)


LOGITS = np.random.default_rng(0).standard_normal((50, 200)).astype(np.float32)


def test_rounding_passes_and_other_logits_do_not() -> None:
    same = compare_logits(FP16, LOGITS, LOGITS + np.float32(0.001))
    assert same.passed
    assert same.weights_greedy_agreement == 1
    assert abs(same.weights_max_logit_difference - 0.001) < 1e-5
    assert abs(same.weights_logit_spread - 1) < 0.05
    other = compare_logits(FP16, LOGITS, LOGITS[::-1])
    assert not other.passed
    with pytest.raises(ExportError, match=r"in fp16 are not those of the model: .* 50 like"):
        other.require_passed()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_no_number_does_not_pass(value: float) -> None:
    broken = LOGITS.copy()
    broken[7, 3] = value
    result = compare_logits(FP16, LOGITS, broken)
    assert result.weights_max_logit_difference == np.inf
    assert not result.passed


def test_near_ties_count_as_agreement_and_others_not() -> None:
    wanted = np.zeros((4, 10), np.float32)
    wanted[:, 0], wanted[:, 1], wanted[:, 2] = 10, 9.99, 5
    wanted[:, 3:] = -5
    near, far = wanted.copy(), wanted.copy()
    near[:, 1] = 10.1
    far[:, 2] = 10.1
    near_result, far_result = (compare_logits(FP16, wanted, got) for got in (near, far))
    assert (near_result.weights_near_ties, near_result.passed) == (4, True)
    assert (far_result.weights_near_ties, far_result.passed) == (0, False)
    assert compare_logits(replace(FP16, least_agreement=0.0), wanted, far).passed
