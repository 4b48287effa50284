"""A graph for TensorRT that means something else is refused, on a host that can't run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import rope_buffers
from llama_decoder.tiny import random_weights, tiny_config
from llama_export.encoders import decode_int4, encode_int4
from llama_export.errors import ExportError
from llama_export.graph_structure import check_structure
from llama_export.precision import Precision, store
from llama_export.precisions import TENSORRT_PRECISIONS
from llama_export.trace import save_graph, trace_skeleton
from llama_export.weight_file import weight_regions, write_weights
from tests.tensorrt_graph import WEIGHTS


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
    return Saved(folder, tiny_config(), TENSORRT_PRECISIONS["fp16"])


@pytest.mark.parametrize("precision", TENSORRT_PRECISIONS.values(), ids=TENSORRT_PRECISIONS)
def test_what_is_exported_has_the_structure_of_the_contract(
    precision: Precision, tmp_path: Path
) -> None:
    Saved(tmp_path, tiny_config(tie_embeddings=True), precision).check()


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
    saved = Saved(tmp_path, tiny_config(tie_embeddings=True), TENSORRT_PRECISIONS["int4"])
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
    expected = decode_int4(*encode_int4(name, rows)).astype(np.float16)
    np.testing.assert_array_equal(wide, expected)
