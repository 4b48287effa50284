"""The packed bytes mean to ONNX Runtime what the numpy reference says they do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from llama_export.quantise.codes import (
    BlockProduct,
    Int8Product,
    num_blocks,
    unpack,
)
from llama_runtime.backends.ort_cpu import import_onnxruntime

# Columns and block: one block a row, an odd number of blocks (whose zero points fill half a byte),
# a last block that is shorter, and the operator's range of block sizes.
SHAPES = [(32, 32), (96, 32), (80, 16), (192, 64), (384, 128), (72, 32), (576, 128), (128, 64)]


def random_product(columns: int, bits: int, block: int, seed: int = 0) -> BlockProduct:
    rng = np.random.default_rng(seed)
    num_rows, count = 24, num_blocks(columns, block)
    return BlockProduct(
        rng.integers(0, 2**bits, (num_rows, columns), np.uint8),
        rng.uniform(0.5, 2, (num_rows, count)).astype(np.float32),
        rng.integers(0, 2**bits, (num_rows, count), np.uint8),
        bits,
        block,
    )


def run(
    nodes: list[onnx.NodeProto], initializers: dict[str, np.ndarray], feed: dict[str, Any]
) -> np.ndarray:
    """Output y of a graph of these nodes."""
    types = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.int64): 7}
    inputs = [
        helper.make_tensor_value_info(name, types[value.dtype], value.shape)
        for name, value in feed.items()
    ]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(value, name) for name, value in initializers.items()]
    graph = helper.make_graph(nodes, "g", inputs, [output], held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = import_onnxruntime().InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: np.ndarray = session.run(["y"], feed)[0]
    return result


def matmul(product: BlockProduct, x: np.ndarray, accuracy_level: int) -> np.ndarray:
    """What MatMulNBits makes of the packed bytes."""
    num_rows, columns = product.codes.shape
    attributes = {
        "N": num_rows,
        "K": columns,
        "bits": product.bits,
        "block_size": product.block,
        "accuracy_level": accuracy_level,
    }
    names = ["x", "packed", "scales", "zero_points"]
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
    held: dict[str, np.ndarray] = {
        "packed": product.packed(),
        "scales": product.scales,
        "zero_points": product.packed_zero_points(),
    }
    return run([node], held, {"x": x})


@pytest.mark.parametrize(("columns", "block"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_operator_reads_what_the_reference_says(columns: int, block: int, bits: int) -> None:
    product = random_product(columns, bits, block)
    x = np.random.default_rng(1).standard_normal((5, columns), dtype=np.float32)
    expected = x.astype(np.float64) @ product.dequantise().T.astype(np.float64)
    size = np.abs(expected).mean()
    exact = matmul(product, x, accuracy_level=0)
    np.testing.assert_allclose(exact, expected, atol=1e-5 * size)
    # At level 4 the activations have 8 bits too, a scale a block.
    close = matmul(product, x, accuracy_level=4)
    assert np.sqrt(np.mean((close - expected) ** 2)) < 0.02 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize(("columns", "block"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_gives_back_the_codes(columns: int, block: int, bits: int) -> None:
    product = random_product(columns, bits, block)
    back = unpack(
        product.packed(), product.scales, product.packed_zero_points(), bits, columns=columns
    )
    np.testing.assert_array_equal(back.codes, product.codes)
    np.testing.assert_array_equal(back.zero_points, product.zero_points)
    assert (back.bits, back.block) == (bits, block)
    # What fills a last block up stands for 0.
    whole = unpack(
        product.packed(),
        product.scales,
        product.packed_zero_points(),
        bits,
        columns=product.scales.shape[1] * block,
    )
    assert not whole.dequantise()[:, columns:].any()


def test_packing_is_what_the_format_says() -> None:
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    scales, zeros = np.ones((1, 1), np.float32), np.full((1, 1), 5, np.uint8)
    product = BlockProduct(codes, scales, zeros, 4, 32)
    assert product.packed().shape == (1, 1, 16)
    assert product.packed()[0, 0, :2].tolist() == [0x10, 0x32]  # the first in the lower half
    assert product.packed_zero_points().tolist() == [[5]]


def test_embedding_rows_are_those_of_the_head() -> None:
    product = random_product(96, 8, 32)
    ids = np.array([3, 0, 23], np.int64)
    node = helper.make_node(
        "GatherBlockQuantized",
        ["rows", "ids", "scales", "zero_points"],
        ["y"],
        domain="com.microsoft",
        bits=8,
        block_size=32,
        gather_axis=0,
        quantize_axis=1,
    )
    held: dict[str, np.ndarray] = {
        "rows": product.packed().reshape(product.codes.shape),  # the very bytes of the product
        "scales": product.scales,
        "zero_points": product.packed_zero_points(),
    }
    got = run([node], held, {"ids": ids})
    np.testing.assert_allclose(got, product.dequantise()[ids], rtol=1e-6)
    np.testing.assert_array_equal(product.taken(ids).dequantise(), product.dequantise()[ids])


def test_bytes_by_bytes_is_the_product_of_whole_numbers() -> None:
    rng = np.random.default_rng(0)
    weights = Int8Product(
        rng.integers(-127, 128, (24, 64), np.int8), rng.uniform(0.5, 2, 24).astype(np.float32)
    )
    x = rng.standard_normal((6, 64), dtype=np.float32)
    x[2] = 0  # a row without a size
    largest = np.abs(x).max(axis=1)
    scales = np.where(largest > 0, largest, 127).astype(np.float32) / np.float32(127)
    codes = (np.rint(x / scales[:, None]) + 128).astype(np.uint8)  # a scale a row, 128 for zero
    node = helper.make_node("MatMulInteger", ["codes", "weights", "zero"], ["sums"])
    cast = helper.make_node("Cast", ["sums"], ["y"], to=onnx.TensorProto.FLOAT)
    held: dict[str, np.ndarray] = {
        "codes": codes,
        "weights": np.ascontiguousarray(weights.codes.T),
        "zero": np.array(128, np.uint8),
    }
    sums = run([node, cast], held, {})
    expected = (codes.astype(np.float64) - 128) @ weights.codes.T
    np.testing.assert_array_equal(sums, expected)
    real = (codes.astype(np.float64) - 128) * scales[:, None] @ weights.dequantise().T
    np.testing.assert_allclose(sums * scales[:, None] * weights.scales, real, rtol=1e-4, atol=1e-4)
