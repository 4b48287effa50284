"""The exported graph computes what the eager decoder computes, on any mix of rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_decoder.attention import slots_attention
from llama_decoder.config import RopeScaling
from llama_decoder.decoder import LlamaDecoder, build_decoder, rope_buffers
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.trace import save_graph, trace_decoder
from llama_export.verify import ComparedBackend
from llama_export.weight_file import (
    float32_layout,
    read_weights,
    weight_regions,
    write_weights,
)
from llama_runtime.backends.ort_cpu import OrtCpu, open_session
from llama_runtime.chunk import Chunk
from llama_runtime.contract import SLOTS
from llama_runtime.kv_cache import SlotCache
from llama_runtime.params import SamplingParams
from llama_runtime.scheduler import Scheduler
from llama_runtime.sequence import Sequence
from llama_runtime.step_batch import StepBatch

LLAMA3 = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=32,
)
SHAPES: dict[str, dict[str, Any]] = {
    "2 query heads a KV head, D 32, explicit head_dim": {},
    "1 query head a KV head, D 80, tied, linear": {
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 80,
        "tie_embeddings": True,
        "rope_scaling": RopeScaling(kind="linear", factor=4.0),
    },
    "8 query heads a KV head, D 64, llama3": {
        "num_heads": 8,
        "num_kv_heads": 1,
        "head_dim": 64,
        "rope_scaling": LLAMA3,
    },
}
TOLERANCE = 1e-4
NUM_SLOTS, MAX_LEN = 5, 200


@pytest.fixture(scope="module", params=SHAPES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, LlamaDecoder]:
    """A graph on disk, and the eager decoder over the same weights."""
    directory = tmp_path_factory.mktemp("graph")
    config = tiny_config(**SHAPES[request.param])
    weights = {n: torch.from_numpy(w) for n, w in random_weights(config, seed=2).items()}
    weights |= dict(rope_buffers(config))
    layout = float32_layout({name: tuple(tensor.shape) for name, tensor in weights.items()})
    arrays = ((name, tensor.numpy()) for name, tensor in weights.items())
    list(write_weights(directory / "model.safetensors", layout, arrays))
    stored = list(read_weights(directory / "model.safetensors"))
    graph = trace_decoder(build_decoder(config, stored, slots_attention), SLOTS)
    save_graph(graph, directory / "decoder.onnx", "model.safetensors", weight_regions(layout))
    return directory / "decoder.onnx", build_decoder(config, weights.items())


def sequence(number: int, prompt: list[int], max_tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(number, prompt, len(prompt), params, 0, None)  # type: ignore[arg-type]


def compared(graph: Path, decoder: LlamaDecoder, max_chunk: int) -> ComparedBackend:
    capacity = MAX_LEN + max_chunk
    session = open_session(graph, threads=2)
    backend = OrtCpu(session, decoder.config.geometry, num_slots=NUM_SLOTS, capacity=capacity)
    return ComparedBackend(backend, decoder, NUM_SLOTS, capacity)


@torch.no_grad()
def test_graph_computes_what_the_decoder_computes_on_chunks_of_every_size(
    exported: tuple[Path, LlamaDecoder],
) -> None:
    """Also those that no scheduler makes: 1 to 40 tokens from any position on, some slots idle."""
    graph, decoder = exported
    choose = random.Random(0)
    backend = compared(graph, decoder, max_chunk=40)
    batch = StepBatch(NUM_SLOTS, 40 * NUM_SLOTS)
    seqs = [sequence(i, [], 1) for i in range(NUM_SLOTS)]
    sizes = [choose.sample(range(1, 41), 40) for _ in seqs]  # every size once, in each slot
    cache = SlotCache(NUM_SLOTS, MAX_LEN)
    for seq in seqs:
        cache.allocate(seq)
    for step in range(40):
        chunks = []
        for seq, size in zip(seqs, (left[step] for left in sizes), strict=True):
            if choose.random() < 0.2:
                continue  # an idle slot
            if seq.num_tokens + size > MAX_LEN:  # go on from an earlier position
                seq.cache_len = choose.randrange(8)
                del seq.token_ids[seq.cache_len :]
            seq.token_ids += choose.choices(range(512), k=size)
            chunks.append(Chunk(seq, size))
        if chunks:
            backend.run(batch.build(chunks))
        for chunk in chunks:
            chunk.seq.cache_len += chunk.num_tokens
    result = backend.result()
    assert result.rows > 100
    assert result.max_logit_difference <= TOLERANCE


@pytest.mark.parametrize("seed", range(6))
def test_graph_computes_what_the_decoder_computes_on_ragged_mixes(
    exported: tuple[Path, LlamaDecoder], seed: int
) -> None:
    """Whole prompts, prompts in chunks, decode steps and idle slots, as a scheduler mixes them."""
    graph, decoder = exported
    choose = random.Random(seed)
    max_chunk = choose.choice([33, 64, 96, 160])
    backend = compared(graph, decoder, max_chunk)
    cache = SlotCache(NUM_SLOTS, MAX_LEN)
    budget = choose.choice([33, 100, 300])
    scheduler = Scheduler(cache, prompt_budget=budget, max_chunk=max_chunk)
    batch = StepBatch(NUM_SLOTS, budget)
    for i in range(12):
        length = choose.choice([1, 2, 3, 33, 34, 65, choose.randint(1, 170)])
        scheduler.add(sequence(i, choose.choices(range(512), k=length), choose.randint(1, 20)))
    with torch.no_grad():
        while chunks := scheduler.schedule():
            logits = backend.run(batch.build(chunks))
            sampled = [chunk.seq for chunk in chunks if chunk.samples]
            for chunk in chunks:
                chunk.seq.cache_len += chunk.num_tokens
            for seq, row in zip(sampled, logits, strict=False):
                seq.token_ids.append(int(row.argmax()))
                aborted = choose.random() < 0.05
                if aborted or seq.num_completion_tokens == seq.params.max_tokens:
                    scheduler.remove(seq)
    result = backend.result()
    assert result.rows > 30
    assert result.max_logit_difference <= TOLERANCE
