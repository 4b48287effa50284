"""The ``tensorrt`` dialect: its numbers on ONNX Runtime's CPU."""

from __future__ import annotations

import random
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_decoder.attention import eager_attention
from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.config import LlamaConfig, RopeScaling
from llama_decoder.decoder import LlamaDecoder, build_decoder
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.precision import Precision
from llama_export.precisions import TENSORRT_CHECK, TENSORRT_PRECISIONS
from llama_export.trace import trace_skeleton
from llama_runtime import SamplingParams
from llama_runtime.loading import load
from llama_runtime.settings import Settings
from tests.tensorrt_graph import (
    WEIGHTS,
    GraphRun,
    tiny_tensorrt_graph,
    write_graph_alone,
)

CONFIGS = {
    "tied": tiny_config(tie_embeddings=True),
    "grouped, llama3": tiny_config(
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_scaling=RopeScaling(
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=32,
        ),
    ),
}
CAPACITY = 48


def whole_logits(decoder: LlamaDecoder, tokens: list[int]) -> np.ndarray:
    """The logits of every token of one sequence, [T, V], in one forward of the eager decoder."""
    count = len(tokens)
    rows = torch.arange(count)
    places = (
        rows[None],
        rows,
        torch.tensor([count - 1], dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        torch.tensor(count, dtype=torch.int32),
    )
    cache = decoder.empty_cache(1, count)
    logits, _ = decoder(torch.tensor(tokens), rows, places, cache)
    return np.asarray(logits)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_schedule_gives_the_logits_of_each_sequence_alone(
    config: LlamaConfig, tmp_path: Path
) -> None:
    """Ragged chunks, idle slots, slots that change hands, rows at the edge of the capacity."""
    decoder = build_decoder(config, random_weights(config, 3).items(), eager_attention)
    run = GraphRun(tiny_tensorrt_graph(config, 3, tmp_path), config, 4, CAPACITY)
    rng = random.Random(7)
    texts: dict[int, list[int]] = {}
    wants: dict[int, np.ndarray] = {}
    finished = at_the_edge = 0
    for _ in range(120):
        for slot in range(4):
            if slot not in texts and rng.random() < 0.4:
                length = CAPACITY if rng.random() < 0.4 else rng.randint(1, CAPACITY)
                texts[slot] = [rng.randrange(config.vocab_size) for _ in range(length)]
                wants[slot] = whole_logits(decoder, texts[slot])
                run.free(slot)
        room = CAPACITY - max(run.lengths)
        if not room:  # a slot that is full stops all others until it is free
            for slot in [slot for slot in range(4) if run.lengths[slot] == CAPACITY]:
                run.free(slot)
            continue
        width = rng.choice([1, 1, 2, 5, 17])
        chunks = {
            slot: text[run.lengths[slot] :][: rng.randint(1, min(width, room))]
            for slot, text in texts.items()
            if rng.random() < 0.7 and run.lengths[slot] < len(text)
        }
        if not chunks:
            continue
        starts = {slot: run.lengths[slot] for slot in chunks}
        for slot, rows in run.step(chunks).items():
            want = wants[slot][starts[slot] :][: len(rows)]
            assert np.abs(rows - want).max() < 1e-4 * want.std(), slot
            if run.lengths[slot] == len(texts[slot]):
                at_the_edge += run.lengths[slot] == CAPACITY
                finished += 1
                del texts[slot]
    assert finished > 8
    assert at_the_edge > 1


def test_the_real_model_writes_what_the_slots_dialect_writes(
    real_bundle: Path, real_gguf: Path, tmp_path: Path
) -> None:
    loaded = load(real_bundle, Settings(max_batch=3, max_len=64), verify="size")
    encode = loaded.encoder.tokenizer.encode
    prompts = [encode(text) for text in ("The capital of France is", "def add(a, b):\n", "Once")]
    engine = loaded.engine
    ids = [engine.add(p, SamplingParams(max_tokens=12, ignore_eos=True)).id for p in prompts]
    wanted: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for event in engine.step():
            assert event.token_id is not None
            wanted[event.sequence_id].append(event.token_id)
    engine.close()
    config = open_checkpoint(real_gguf).config
    weights = tmp_path / WEIGHTS
    shutil.copyfile(real_bundle / WEIGHTS, weights)  # others, who read it too, refuse a hard link
    try:
        run = GraphRun(write_graph_alone(config, tmp_path), config, 4, 64)
    finally:
        weights.unlink()
    chunks: dict[int, list[int]] = {0: prompts[0], 1: prompts[1], 3: prompts[2]}
    found: dict[int, list[int]] = {slot: [] for slot in chunks}
    for _ in range(12):
        rows = run.step(chunks)
        chunks = {slot: [int(logits[-1].argmax())] for slot, logits in rows.items()}
        for slot, tokens in chunks.items():
            found[slot] += tokens
    assert list(found.values()) == list(wanted.values())


@cache
def form(config: LlamaConfig, precision: Precision) -> list[object]:
    """All that a traced graph is, but for element types."""
    graph = trace_skeleton(config, precision).graph
    shapes = [
        (value.name, [str(axis) for axis in value.shape or ()])
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())
    ]
    nodes = [
        (
            node.domain,
            node.op_type,
            [None if value is None else value.name for value in node.inputs],
            [value.name for value in node.outputs],
            sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()),
        )
        for node in graph
    ]
    return [shapes, nodes]


@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_graph_that_is_checked_differs_in_types_alone(config: LlamaConfig, name: str) -> None:
    assert form(config, TENSORRT_PRECISIONS[name]) == form(config, TENSORRT_CHECK)
