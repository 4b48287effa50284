"""The ``tensorrt`` dialect: its numbers on ONNX Runtime's CPU, and its form."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from llama_decoder.attention import eager_attention
from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.config import LlamaConfig, RopeScaling
from llama_decoder.decoder import LlamaDecoder, build_decoder, rope_buffers
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.errors import ExportError
from llama_export.graph_structure import check_structure
from llama_export.precision import Precision, dequantise_int4, quantise_int4, store
from llama_export.precisions import TENSORRT_CHECK, TENSORRT_PRECISIONS
from llama_export.trace import save_graph, trace_skeleton
from llama_export.weight_file import weight_regions, write_weights
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


class Saved:
    """A graph with its weights, as a bundle has them."""

    def __init__(self, folder: Path, config: LlamaConfig, precision: Precision) -> None:
        self.config, self.precision = config, precision
        self.graph, self.weights = folder / "decoder.onnx", folder / WEIGHTS
        self.layout = precision.layout(config)
        tables = ((name, table.numpy()) for name, table in rope_buffers(config))
        tensors = (*random_weights(config, 1).items(), *tables)
        for _ in write_weights(self.weights, self.layout, store(precision, tensors)):
            pass
        traced = trace_skeleton(config, precision)
        save_graph(traced, self.graph, WEIGHTS, weight_regions(self.layout))

    def check(self, graph: Path | None = None) -> None:
        layout, geometry = self.layout, self.config.geometry
        check_structure(graph or self.graph, self.weights, geometry, self.precision, layout)

    def changed(self, how: Callable[[Any], None]) -> Path:
        model = onnx.load(self.graph, load_external_data=False)
        how(model.graph)
        path = self.graph.with_name("changed.onnx")
        path.write_bytes(model.SerializeToString())
        return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("sound")
    return Saved(folder, CONFIGS["grouped, llama3"], TENSORRT_PRECISIONS["fp16"])


@pytest.mark.parametrize("precision", TENSORRT_PRECISIONS.values(), ids=TENSORRT_PRECISIONS)
def test_what_is_exported_has_the_structure_of_the_contract(
    precision: Precision, tmp_path: Path
) -> None:
    Saved(tmp_path, CONFIGS["tied"], precision).check()


def first(graph: Any, operator: str) -> Any:
    return next(node for node in graph.node if node.op_type == operator)


def all_of(graph: Any, operator: str) -> list[Any]:
    return [node for node in graph.node if node.op_type == operator]


def causal_too(graph: Any) -> None:
    first(graph, "Attention").attribute[0].i = 1


def without_mask(graph: Any) -> None:
    del first(graph, "Attention").input[3:]


def sees_less(graph: Any) -> None:
    node = first(graph, "LessOrEqual")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def caches_exchanged(graph: Any) -> None:
    key, value = all_of(graph, "TensorScatter")[:2]
    key.input[0], value.input[0] = value.input[0], key.input[0]


def presents_exchanged(graph: Any) -> None:
    first_layer, second_layer = all_of(graph, "TensorScatter")[0::2]
    first_layer.output[0], second_layer.output[0] = second_layer.output[0], first_layer.output[0]


def circular(graph: Any) -> None:
    node = first(graph, "TensorScatter")
    next(each for each in node.attribute if each.name == "mode").s = b"circular"


def keys_not_turned(graph: Any) -> None:
    first(graph, "TensorScatter").input[1] = all_of(graph, "TensorScatter")[1].input[1]


def tables_exchanged(graph: Any) -> None:
    node = first(graph, "RotaryEmbedding")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def turned_elsewhere(graph: Any) -> None:
    first(graph, "RotaryEmbedding").input[3] = "unpack"


def matrix_twice(graph: Any) -> None:
    second, third = all_of(graph, "Gemm")[2:4]  # gate and up
    second.input[1] = third.input[1]


def not_transposed(graph: Any) -> None:
    attributes = first(graph, "Gemm").attribute
    next(each for each in attributes if each.name == "transB").i = 0


FAULTS = (
    causal_too,
    without_mask,
    sees_less,
    caches_exchanged,
    presents_exchanged,
    circular,
    keys_not_turned,
    tables_exchanged,
    turned_elsewhere,
    matrix_twice,
    not_transposed,
)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_a_graph_that_means_something_else_is_refused(
    fault: Callable[[Any], None], sound: Saved
) -> None:
    with pytest.raises(ExportError):
        sound.check(sound.changed(fault))


def test_four_bits_are_the_same_weights_as_for_cuda(tmp_path: Path) -> None:
    """Widened by ONNX Runtime's DequantizeLinear, whose numbers are signed."""
    saved = Saved(tmp_path, CONFIGS["tied"], TENSORRT_PRECISIONS["int4"])
    model = onnx.load(saved.graph, load_external_data=False)
    name = first(model.graph, "DequantizeLinear").output[0]
    graph = onnx.helper.make_graph(
        [first(model.graph, "DequantizeLinear")],
        "alone",
        [],
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None)],
        [each for each in model.graph.initializer if each.name.startswith(name)],
    )
    alone = tmp_path / "alone.onnx"
    opsets = [onnx.helper.make_opsetid("", 23)]
    alone.write_bytes(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    )
    (wide,) = onnxruntime.InferenceSession(alone).run(None, {})
    rows = random_weights(saved.config, 1)[name]
    expected = dequantise_int4(*quantise_int4(name, rows)).astype(np.float16)
    np.testing.assert_array_equal(wide, expected)
