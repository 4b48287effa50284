"""Products of bytes are tried out, and made exact where they aren't."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from llama_runtime.backends import ort_cpu
from llama_runtime.backends.byte_probe import MODEL, TERMS, bytes_are_exact
from llama_runtime.backends.ort_cpu import open_session
from tests.old_cpu.cases import write_byte_product

OPTION = "session.x64quantprecision"


def test_the_probe_is_the_product_that_it_says() -> None:
    model = onnx.load_from_string(MODEL)
    onnx.checker.check_model(model, full_check=True)
    (weights,) = model.graph.initializer
    codes = onnx.numpy_helper.to_array(weights)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, np.full((TERMS, 4), 127))
    values = [
        helper.make_tensor_value_info("x", TensorProto.UINT8, [2, TERMS]),
        helper.make_tensor_value_info("y", TensorProto.INT32, [2, 4]),
    ]
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "g", values[:1], values[1:], [weights])
    versions = [helper.make_opsetid("", 10)]
    assert helper.make_model(graph, opset_imports=versions, ir_version=7) == model


@pytest.mark.parametrize("exact", [True, False])
def test_signed_bytes_become_unsigned_only_where_products_are_wrong(
    exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cpu, "bytes_are_exact", lambda: exact)
    write_byte_product(tmp_path / "product", 64, 33)
    options = open_session(tmp_path / "product.onnx", 1).get_session_options()
    if exact:
        with pytest.raises(RuntimeError, match=OPTION):
            options.get_session_config_entry(OPTION)
    else:
        assert options.get_session_config_entry(OPTION) == "1"


def test_the_answer_is_that_of_a_product_without_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort_cpu, "bytes_are_exact", lambda: True)
    write_byte_product(tmp_path / "product", 64, 33)
    case = np.load(tmp_path / "product.npz")
    session = open_session(tmp_path / "product.onnx", 1)
    found = session.run(None, {"codes": case["codes"]})
    assert bytes_are_exact() == all(np.array_equal(one, case["expected"]) for one in found)
