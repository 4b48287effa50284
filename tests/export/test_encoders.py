"""Rows in 4 bits are those of ONNX Runtime, and what its operator multiplies with."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from llama_export.encoders import INT4_BLOCK, decode_int4, encode_int4, int4_names
from llama_export.gpu_products import quantise_products
from llama_export.precisions import CUDA_PRECISIONS
from llama_runtime.backends.ort_cpu import import_onnxruntime

INT4 = CUDA_PRECISIONS["int4"]


def blocks_of_all_kinds() -> np.ndarray:
    """Rows of products: random, zeros, of one sign, equal extremes, halves of a step, outliers."""
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((40, 4 * INT4_BLOCK), dtype=np.float32)
    rows[0] = 0
    rows[1] = np.abs(rows[1])
    rows[2] = -np.abs(rows[2])
    rows[3, ::INT4_BLOCK], rows[3, 1::INT4_BLOCK] = 4, -4
    rows[4, ::INT4_BLOCK], rows[4, 1::INT4_BLOCK] = -4, 4
    rows[5] = (np.arange(4 * INT4_BLOCK) % 17 - 8) / 2  # steps and their halves
    rows[6, 5] = 500
    rows[7] *= np.float32(1e-4)
    return rows


def test_int4_bytes_are_those_of_onnxruntime() -> None:
    import_onnxruntime()
    from onnxruntime.capi.onnxruntime_pybind11_state import quantize_matmul_4bits

    rows = blocks_of_all_kinds()
    num_rows, columns = rows.shape
    blocks = columns // INT4_BLOCK
    expected = np.zeros((num_rows, blocks, INT4_BLOCK // 2), np.uint8)
    scales = np.zeros(num_rows * blocks, np.float32)
    zeros = np.zeros(num_rows * blocks, np.uint8)
    transposed = np.ascontiguousarray(rows.T)
    quantize_matmul_4bits(expected, transposed, scales, zeros, INT4_BLOCK, num_rows, columns, True)
    packed, halves = encode_int4("w", rows)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(halves.ravel(), scales.astype(np.float16))


def test_int4_is_off_by_half_a_step_at_most_except_at_one_end() -> None:
    rows = blocks_of_all_kinds()
    packed, scales = encode_int4("w", rows)
    error = np.abs(decode_int4(packed, scales) - rows).reshape(len(rows), -1, INT4_BLOCK)
    step = np.abs(scales.astype(np.float32))[..., None]
    assert (error <= 1.01 * step + 1e-7).all()  # the end of the other sign has 7 steps, not 8
    assert np.quantile(error / (step + 1e-9), 0.9) < 0.5


def multiplied(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What ONNX Runtime makes of a product that the pass has changed."""
    name = "layer.o_proj.weight"
    half = onnx.TensorProto.FLOAT16
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", name], ["y"], transB=1)],
        "product",
        [helper.make_tensor_value_info("x", half, ["n", rows.shape[1]])],
        [helper.make_tensor_value_info("y", half, ["n", len(rows)])],
        [numpy_helper.from_array(rows.astype(np.float16), name)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    model = ir.from_proto(proto)
    assert quantise_products(model) == 1
    assert set(model.graph.initializers) == set(int4_names(name))
    for stored, piece in zip(int4_names(name), INT4.encode(name, rows), strict=True):
        model.graph.initializers[stored].const_value = ir.tensor(piece, name=stored)
    model.opset_imports["com.microsoft"] = 1
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x.astype(np.float16)})
    result: np.ndarray = y
    return result


def test_the_operator_multiplies_with_what_the_bytes_stand_for() -> None:
    rows = blocks_of_all_kinds()
    x = np.random.default_rng(2).standard_normal((5, rows.shape[1]), dtype=np.float32)
    expected = x.astype(np.float16).astype(np.float32) @ decode_int4(*encode_int4("w", rows)).T
    np.testing.assert_allclose(multiplied(rows, x), expected, rtol=2e-2, atol=3e-2)
