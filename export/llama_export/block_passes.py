"""The CPU's graph with 4-bit weights in blocks.

Shape letters are those of ``llama_runtime.contract``; a product's matrix is [N', K].

Source of the operators: their schemas in ONNX Runtime 1.32 (docs/ContribOperators.md), and the
standard's specifications (onnx.ai, opset 23).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llama_decoder.names import EMBEDDING
from llama_export.graph_edits import constant, drop_unused, initializer, like, node, replace
from llama_export.host_products import Product, embeddings, products
from llama_export.host_weights import BlockWeights
from llama_export.weight_file import Stored


def quantise_blocks(model: ir.Model, weights: BlockWeights) -> int:
    """Multiply with weights of 4 bits, and of 8 where embedding and head are.

    MatMulNBits with ``accuracy_level`` 4 quantises its activations itself, in blocks of a row.

    Args:
        model: changed in place.
        weights: names and shapes of what the weight file holds.

    Returns:
        How many products were changed.
    """
    changed, block_sums = 0, _BlockSums(model, weights.block)
    for product in list(products(model)):
        _multiply(model, weights, product, block_sums)
        changed += 1
    for gather, parameter in embeddings(model):
        _look_up(model, weights, gather, parameter)
    drop_unused(model)
    return changed


def _multiply(
    model: ir.Model, weights: BlockWeights, product: Product, block_sums: _BlockSums
) -> None:
    """MatMulNBits, then what the offsets of the blocks add, then the residual."""
    rows, columns = weights.shapes[product.parameter]
    sizes = {
        "K": columns,
        "N": rows,
        "bits": weights.bits(product.parameter),
        "block_size": weights.block,
        "accuracy_level": 4,
    }
    result = like(product.gemm.outputs[0])
    last, residual = result, product.residual
    offsets = weights.offsets_name(product.parameter)
    if residual is not None or offsets is not None:
        last = _named_after(result, "product")
    nodes = [
        ir.Node(
            "com.microsoft",
            "MatMulNBits",
            [product.rows, *_initializers(model, weights, product.parameter, product.twin)],
            [ir.AttrInt64(name, size) for name, size in sizes.items()],
            outputs=[last],
            name=product.gemm.name,
        )
    ]
    if offsets is not None:
        sums = block_sums.of(product.rows, columns // weights.block, nodes)
        matrix = initializer(model, offsets, weights.layout[offsets])
        whole = result if residual is None else _named_after(result, "whole")
        nodes.append(ir.Node("", "Gemm", [sums, matrix, last], outputs=[whole]))
        last = whole
    if residual is not None:
        nodes.append(ir.Node("", "Add", [last, residual], outputs=[result]))
    replace(model, product.gemm, nodes, result)


def _look_up(model: ir.Model, weights: BlockWeights, gather: ir.Node, parameter: str) -> None:
    """Rows of the embedding are looked up as codes, and widened."""
    codes, scales, zero_points = _initializers(model, weights, parameter)
    result = like(gather.outputs[0])
    sizes = {"bits": 8, "block_size": weights.block, "gather_axis": 0, "quantize_axis": 1}
    widened = ir.Node(
        "com.microsoft",
        "GatherBlockQuantized",
        [codes, gather.inputs[1], scales, zero_points],
        [ir.AttrInt64(name, size) for name, size in sizes.items()],
        outputs=[result],
    )
    replace(model, gather, [widened], result)


def _named_after(result: ir.Value, what: str) -> ir.Value:
    """A value on the way to a result, of the same type and shape."""
    return ir.Value(name=f"{result.name}.{what}", type=result.type, shape=result.shape)


class _BlockSums:
    """The sums of activations over each block of a row, made once for all products that need them.

    Args:
        model: the graph.
        block: columns of a block.
    """

    def __init__(self, model: ir.Model, block: int) -> None:
        self._model, self._block = model, block
        self._made: dict[ir.Value, ir.Value] = {}

    def of(self, rows: ir.Value, num_blocks: int, nodes: list[ir.Node]) -> ir.Value:
        """[N, K/b] of rows [N, K]."""
        if rows not in self._made:
            cut = constant(
                self._model,
                f"blocks_{num_blocks}",
                np.array([-1, num_blocks, self._block], np.int64),
            )
            axis = constant(self._model, "last_axis", np.array([-1], np.int64))
            blocks = node(nodes, "Reshape", [rows, cut], f"{rows.name}.blocks")
            sums = node(nodes, "ReduceSum", [blocks, axis], f"{rows.name}.sums", keepdims=0)
            self._made[rows] = sums
        return self._made[rows]


def _initializers(
    model: ir.Model, weights: BlockWeights, parameter: str, twin: bool = False
) -> tuple[ir.Value, ...]:
    """Codes, scales and zero points of a parameter.

    The codes of an embedding that is the head too have two names, so that ONNX Runtime may pack
    those of the product and drop them.
    """
    codes, *others = weights.names(parameter)
    stored = weights.layout[codes]
    if not twin and parameter == EMBEDDING:
        stored = Stored(stored.tag, (stored.shape[0], stored.shape[1] * stored.shape[2]))
        first = initializer(model, f"{codes}.rows", stored, of=codes)
    else:
        first = initializer(model, codes, stored)
    return (first, *(initializer(model, name, weights.layout[name]) for name in others))
