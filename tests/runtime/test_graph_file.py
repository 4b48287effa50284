"""The look at a graph before ONNX Runtime: what the exporter writes passes, and little else."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.errors import BackendError
from llama_runtime.graph_file import OPERATORS, _check_model, _Graph, _RefusedError, check_graph

# What else a graph may not do is in tests/hostile/bundles.py.


def test_what_the_exporter_writes_passes_and_uses_every_operator(tiny_bundle: Path) -> None:
    check_graph(tiny_bundle / "decoder.onnx")
    nodes = onnx.load(tiny_bundle / "decoder.onnx", load_external_data=False).graph.node
    used = {(node.domain, node.op_type) for node in nodes}
    assert used <= {(domain, name) for domain, names in OPERATORS.items() for name in names}


def graph_of(*nodes: onnx.NodeProto) -> memoryview:
    """A graph with an input x and a matrix w of four bytes."""
    matrix = onnx.numpy_helper.from_array(np.ones((2, 2), np.int8), "w")
    graph = onnx.GraphProto(node=nodes, initializer=[matrix])
    return memoryview(onnx.ModelProto(graph=graph).SerializeToString())


def node(operator: str, *names: str) -> onnx.NodeProto:
    """The last name is that of the result."""
    domain = "com.microsoft" if operator == "MatMulIntegerToFloat" else ""
    return onnx.helper.make_node(operator, names[:-1], names[-1:], domain=domain)


def test_a_matrix_may_be_turned_for_a_product(tmp_path: Path) -> None:
    turned = node("Transpose", "w", "t")
    product = node("MatMulIntegerToFloat", "x", "t", "y")
    _read(graph_of(turned, product), tmp_path)
    _read(graph_of(product, turned), tmp_path)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Transpose", "w", "t"), node("Transpose", "t", "y")],
        [node("Transpose", "w", "t"), node("MatMul", "t", "t", "y")],
        [node("Transpose", "w", "t"), node("Pad", "t", "w", "y")],
        [node("Transpose", "w", "t"), node("Add", "x", "t", "y")],
        [node("Transpose", "w", "t"), node("MatMulIntegerToFloat", "t", "w", "y")],
        [node("Add", "t", "t", "y"), node("Transpose", "w", "t")],
        [node("MatMul", "w", "w", "y")],
    ],
    ids=lambda nodes: " ".join(each.op_type for each in nodes),
)
def test_nothing_else_is_computed_of_it_while_the_graph_loads(
    nodes: list[onnx.NodeProto], tmp_path: Path
) -> None:
    """ONNX Runtime would: a chain of such nodes takes any time and memory."""
    with pytest.raises(_RefusedError, match="works on"):
        _read(graph_of(*nodes), tmp_path)


def _read(data: memoryview, folder: Path) -> None:
    _check_model(data, _Graph(folder, OPERATORS))


def test_a_graph_that_passes_may_be_written_in_pieces(tiny_bundle: Path) -> None:
    """A field that comes twice is merged by protocol buffers, so both parts are looked at."""
    data = (tiny_bundle / "decoder.onnx").read_bytes()
    loop = onnx.helper.make_node("Loop", ["logits"], ["x"])
    more = onnx.ModelProto(graph=onnx.GraphProto(node=[loop])).SerializeToString()
    with pytest.raises(_RefusedError, match="'Loop'"):
        _check_model(memoryview(data + more), _Graph(tiny_bundle, OPERATORS))


def test_dimensions_are_read_in_both_spellings(tiny_bundle: Path) -> None:
    def model(field: bytes) -> memoryview:
        tensor = field + b"\x10\x01" + b"\x42\x01w"  # float32, named w
        graph = b"\x2a" + bytes([len(tensor)]) + tensor
        return memoryview(b"\x3a" + bytes([len(graph)]) + graph)

    for dims in (b"\x0a\x02\x7f\x7f", b"\x08\x7f\x08\x7f"):  # packed, and one by one
        with pytest.raises(_RefusedError, match=r"'w' of the shape \[127, 127\] are not in the"):
            _check_model(model(dims), _Graph(tiny_bundle, OPERATORS))


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
def test_weights_behind_a_link_are_refused(kind: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Also where nobody has checked the bundle; ONNX Runtime reads through a hard link."""
    weights = shutil.copyfile(tiny_bundle / "model.safetensors", tmp_path / "outside")
    folder = tmp_path / "bundle"
    folder.mkdir()
    shutil.copyfile(tiny_bundle / "decoder.onnx", folder / "decoder.onnx")
    if kind == "hard":
        (folder / "model.safetensors").hardlink_to(weights)
    else:
        (folder / "model.safetensors").symlink_to(weights)
    with pytest.raises(BackendError, match="a link or no regular file"):
        check_graph(folder / "decoder.onnx")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_in_one_way(data: bytes) -> None:
    with pytest.raises(_RefusedError):
        _check_model(memoryview(data), _Graph(Path("/nowhere"), OPERATORS))


@given(st.data())
def test_a_damaged_graph_is_refused_in_one_way_or_passes(
    tiny_bundle: Path, data: st.DataObject
) -> None:
    content = bytearray((tiny_bundle / "decoder.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    with contextlib.suppress(_RefusedError):
        _check_model(memoryview(bytes(content)), _Graph(tiny_bundle, OPERATORS))
