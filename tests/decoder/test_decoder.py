"""The eager decoder computes what transformers computes, for whole prompts and in steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.config import LlamaConfig, RopeScaling
from llama_decoder.decoder import KeyValue, LlamaDecoder, build_decoder
from llama_decoder.tiny import tiny_config, write_huggingface

LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=32,
)
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads, explicit head_dim": {},
    "as many KV heads, tied": {"num_kv_heads": 4, "tie_embeddings": True},
    "one KV head of 8": {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64},
    "head_dim 80": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 80, "rope_theta": 500_000.0},
    "llama3 scaling, tied": {"rope_scaling": LLAMA3, "tie_embeddings": True},
    "linear scaling": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=SHAPES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LlamaDecoder, LlamaForCausalLM]:
    config = tiny_config(**SHAPES[request.param])
    return load_both(config, tmp_path_factory.mktemp("model"))


def load_both(config: LlamaConfig, directory: Path) -> tuple[LlamaDecoder, LlamaForCausalLM]:
    write_huggingface(config, directory, seed=1)
    checkpoint = open_checkpoint(directory)
    decoder = build_decoder(checkpoint.config, checkpoint.weights())
    reference = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return decoder, reference.eval()


def one_slot(start: int, count: int, slot: int, num_slots: int) -> list[torch.Tensor]:
    """The contract's inputs for one chunk in one slot, between ids and cache."""
    unpack = torch.zeros(num_slots, count, dtype=torch.int64)
    unpack[slot] = torch.arange(count)
    lengths = torch.zeros(2, num_slots, dtype=torch.int32)
    lengths[:, slot] = torch.tensor([start + count - 1, count])
    total = torch.tensor(start + count, dtype=torch.int32)
    return [unpack, torch.arange(count) + slot * count, lengths[0], lengths[1], total]


def run_in_chunks(decoder: LlamaDecoder, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of every position, computed chunk by chunk in slot 1 of 3."""
    cache: list[KeyValue] = decoder.empty_cache(3, capacity=len(ids) + max(sizes))
    start, logits = 0, []
    for size in sizes:
        inputs = one_slot(start, size, 1, 3)
        rows = torch.arange(size)
        out, cache = decoder(ids[start : start + size], rows, inputs, cache)
        logits.append(out)
        start += size
    assert start == len(ids)
    return torch.cat(logits)


@pytest.mark.parametrize(
    "sizes",
    [[60], [32, 28], [1] * 60, [7, 1, 1, 31, 2, 18]],
    ids=["whole", "two chunks", "token by token", "mixed"],
)
def test_decoder_computes_what_transformers_computes(
    pair: tuple[LlamaDecoder, LlamaForCausalLM], sizes: list[int]
) -> None:
    decoder, reference = pair
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 512, 60))
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    difference = (run_in_chunks(decoder, ids, sizes) - expected).abs().max()
    assert difference <= TOLERANCE


def test_decoder_leaves_the_incoming_cache_as_it_was(
    pair: tuple[LlamaDecoder, LlamaForCausalLM],
) -> None:
    decoder, _ = pair
    cache = decoder.empty_cache(3, capacity=8)
    ids = torch.arange(4)
    _, present = decoder(ids, torch.tensor([3]), one_slot(0, 4, 1, 3), cache)
    assert not any(tensor.any() for layer in cache for tensor in layer)
    for key, value in present:
        assert key[1, :, :4].any()
        assert value[1, :, :4].any()
        assert not key[[0, 2]].any(), "an idle slot was written"
        assert not key[1, :, 4:].any(), "the cache was written past the chunk"
