"""The products of the layers in a GPU's graph: with 4-bit weights, or with transposed ones.

Shape letters are those of ``llama_runtime.contract``; a product's matrix is [N', K].
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llama_export.encoders import INT4_BLOCK, int4_names, int4_tensors
from llama_export.graph_edits import initializer, like, registered, replace
from llama_export.precision import PRODUCTS


def quantise_products(model: ir.Model) -> int:
    """Let the products of the layers read 4-bit weights: Gemm becomes MatMulNBits.

    Their values and scales get the names of ``encoders.int4_names``; the bytes lie in the weight
    file. Embedding and head stay as they are: they matter most to the likeliest token.

    Source: the operator's schema in ONNX Runtime 1.32 (docs/ContribOperators.md).

    Args:
        model: changed in place; traced with fp16 activations.

    Returns:
        How many products were changed.
    """
    changed = 0
    for gemm, weight, (rows, columns) in _layer_products(model):
        tensors = int4_tensors(weight.name, (rows, columns))
        stored = [
            initializer(model, name, tensor)
            for name, tensor in zip(int4_names(weight.name), tensors, strict=True)
        ]
        sizes = {"K": columns, "N": rows, "bits": 4, "block_size": INT4_BLOCK}
        result = like(gemm.outputs[0])
        product = ir.Node(
            "com.microsoft",
            "MatMulNBits",
            [gemm.inputs[0], *stored],
            [ir.AttrInt64(name, size) for name, size in sizes.items()],
            outputs=[result],
            name=gemm.name,
        )
        replace(model, gemm, [product], result)
        del model.graph.initializers[weight.name]
        changed += 1
    return changed


def dequantise_products(model: ir.Model) -> int:
    """Let the products of the layers read 4-bit weights that a node of their own widens.

    ``Gemm(x, w)`` becomes ``Gemm(x, DequantizeLinear(values, scales))``, which TensorRT computes in
    one kernel without writing the wide weights out. Names and bytes are as for
    ``quantise_products``; values are signed.

    Source: the operator's specification (onnx.ai, opset 23).

    Args:
        model: changed in place; traced with fp16 activations.

    Returns:
        How many products were changed.
    """
    changed = 0
    for gemm, weight, (rows, columns) in _layer_products(model):
        values_name, scales_name = int4_names(weight.name)
        _, scales = int4_tensors(weight.name, (rows, columns))
        digits = np.broadcast_to(np.zeros((), ml_dtypes.int4), (rows, columns))
        wide = ir.Node(
            "",
            "DequantizeLinear",
            [registered(model, values_name, digits), initializer(model, scales_name, scales)],
            [ir.AttrInt64("axis", 1), ir.AttrInt64("block_size", INT4_BLOCK)],
            outputs=[ir.Value(name=weight.name, type=weight.type, shape=weight.shape)],
        )
        model.graph.insert_before(gemm, wide)
        del model.graph.initializers[weight.name]
        gemm.replace_input_with(1, wide.outputs[0])
        changed += 1
    return changed


def transpose_products(model: ir.Model) -> int:
    """Let the products of the layers read transposed weights: Gemm becomes MatMul.

    ``Gemm(x, w, transB=1)`` with w [N, K] becomes ``MatMul(x, w)`` with w [K, N], for which cuBLAS
    has faster kernels; ``precision.Precision`` has the figures. The initializer keeps its name.

    Args:
        model: changed in place.

    Returns:
        How many products were changed.
    """
    changed = 0
    for gemm, weight, (rows, columns) in _layer_products(model):
        factor_is_turned = "transB" in gemm.attributes and gemm.attributes["transB"].value == 1
        if not factor_is_turned or len(gemm.inputs) > 2 or len(weight.uses()) > 1:
            continue  # no bundle's graph has such a one, ``check_structure`` refuses it
        turned = ir.Value(name=weight.name, type=weight.type, shape=ir.Shape((columns, rows)))
        if weight.const_value is not None:
            turned.const_value = _transposed(weight.const_value)
        result = like(gemm.outputs[0])
        product = ir.Node("", "MatMul", [gemm.inputs[0], turned], outputs=[result], name=gemm.name)
        replace(model, gemm, [product], result)
        del model.graph.initializers[weight.name]
        model.graph.register_initializer(turned)
        changed += 1
    return changed


def _layer_products(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value, tuple[int, int]]]:
    """Each product of a layer, its matrix and that one's rows and columns."""
    for gemm in [node for node in model.graph if node.op_type == "Gemm"]:
        weight = gemm.inputs[1]
        if weight is not None and weight.name is not None and weight.name.endswith(PRODUCTS):
            rows, columns = (int(size) for size in weight.shape or ())
            yield gemm, weight, (rows, columns)


def _transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The transpose, which is made when somebody reads it: a skeleton's is never read."""

    def make() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype)

    shape = ir.Shape(tuple(tensor.shape)[::-1])
    return ir.LazyTensor(make, dtype=tensor.dtype, shape=shape, name=tensor.name)
