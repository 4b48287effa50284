"""The CPU's graph with 8-bit weights: bytes are multiplied with bytes.

Shape letters are those of ``llama_runtime.contract``; a product's matrix is [N', K].

Source of the operators: their schemas in ONNX Runtime 1.32 (docs/ContribOperators.md), and the
standard's specifications (onnx.ai, opset 23).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llama_export.graph_edits import constant, drop_unused, initializer, like, node, replace
from llama_export.host_products import Product, embeddings, is_table, products
from llama_export.host_weights import Int8Weights
from llama_export.passes import TWIN
from llama_export.quantise.rotation import NORM_STEP, hadamard, inner_block
from llama_export.quantise.rounding import HEAD_TURN

ZERO_POINT = 128  # what stands for 0 in unsigned bytes
STEPS = 127  # from 0 to a row's largest magnitude: then a byte reaches as far in both directions


def quantise_rows(model: ir.Model, weights: Int8Weights) -> int:
    """Multiply bytes with bytes: rows of activations are quantised, each on its own.

    Rows that come out of a norm all have the same scale (``NORM_STEP``). Any other row's scale is
    its largest magnitude over 127. So rows don't depend on each other, and sums of bytes are exact.
    Rows are quantised once for all products that read them.

    The weights are those of a turned model (``quantise.rotation``): what goes into down is turned
    here, and what goes into a head that is the embedding too.

    Args:
        model: changed in place.
        weights: names and shapes of what the weight file holds.

    Returns:
        How many products were changed.
    """
    return _RowQuantiser(model, weights).run()


class _RowQuantiser:
    """The work of ``quantise_rows``, and what it shares between the layers."""

    def __init__(self, model: ir.Model, weights: Int8Weights) -> None:
        self._model, self._weights = model, weights
        self._one = constant(model, "one", np.array(1, np.float32))
        self._step = constant(model, "row_step", np.array(1 / STEPS, np.float32))
        self._norm_step = constant(model, "norm_step", np.array(NORM_STEP, np.float32))
        self._zero_point = constant(model, "zero_point", np.array(ZERO_POINT, np.uint8))
        self._last_axis = constant(model, "last_axis", np.array([-1], np.int64))
        self._column = constant(model, "one_column", np.array([-1, 1], np.int64))
        self._normed: dict[ir.Value, ir.Value] = {}  # the codes of what comes out of norms
        self._zero_points: dict[str, ir.Value] = {}

    def run(self) -> int:
        changed = 0
        for product in list(products(self._model)):
            self._change(product)
            changed += 1
        for gather, name in embeddings(self._model):
            self._widen(gather, name)
        drop_unused(self._model)
        return changed

    def _change(self, product: Product) -> None:
        nodes: list[ir.Node] = []
        result = like(product.gemm.outputs[0])
        producer = product.rows.producer()
        # A head's rows have scales of their own, which are no numbers where the rows are none: what
        # went wrong in a sequence must be seen in its logits.
        normed = producer is not None and producer.op_type == "RMSNormalization"
        if normed and not is_table(product.parameter):
            self._multiply(
                product, self._normed_codes(product, nodes), self._norm_step, result, nodes
            )
        else:
            codes, scale = self._row_codes(product, nodes)
            raw = ir.Value(name=f"{result.name}.raw", type=result.type, shape=result.shape)
            self._multiply(product, codes, self._one, raw, nodes)
            if product.residual is None:
                nodes.append(ir.Node("", "Mul", [raw, scale], outputs=[result]))
            else:
                inputs = [product.residual, raw, scale]
                nodes.append(ir.Node("com.microsoft", "GatedAdd", inputs, outputs=[result]))
        replace(self._model, product.gemm, nodes, result)

    def _multiply(
        self,
        product: Product,
        codes: ir.Value,
        step: ir.Value,
        result: ir.Value,
        nodes: list[ir.Node],
    ) -> None:
        """The product itself, of rows of which each step stands for ``step``."""
        factor = self._factor(product, nodes)
        inputs = [codes, factor, step, self._scales(product.parameter), self._zero_point]
        name = product.gemm.name
        nodes.append(
            ir.Node("com.microsoft", "MatMulIntegerToFloat", inputs, outputs=[result], name=name)
        )

    def _normed_codes(self, product: Product, nodes: list[ir.Node]) -> ir.Value:
        """Codes [N, E] of what comes out of a norm, made once for all products that read them."""
        assert product.residual is None
        rows = product.rows
        if rows not in self._normed:
            inputs = [rows, self._norm_step, self._zero_point]
            self._normed[rows] = node(nodes, "QuantizeLinear", inputs, f"{rows.name}.codes")
        return self._normed[rows]

    def _row_codes(self, product: Product, nodes: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
        """Codes [N, K] of a product's rows, turned, and their scales [N, 1]."""
        rows = self._turned(product, nodes)
        name = rows.name
        magnitudes = node(nodes, "Abs", [rows], f"{name}.magnitudes")
        largest = node(nodes, "ReduceMax", [magnitudes, self._last_axis], f"{name}.largest")
        scale = node(nodes, "Mul", [largest, self._step], f"{name}.scale")
        zero_points = self._row_zero_points(product, nodes)
        codes = node(
            nodes,
            "QuantizeLinear",
            [rows, scale, zero_points],
            f"{name}.codes",
            axis=1,
            block_size=self._weights.shapes[product.parameter][1],
        )
        return codes, scale

    def _turned(self, product: Product, nodes: list[ir.Node]) -> ir.Value:
        """A product's rows as its matrix expects them."""
        rows = product.rows
        if product.twin:
            turn = initializer(self._model, HEAD_TURN, self._weights.layout[HEAD_TURN])
            return node(nodes, "MatMul", [rows, turn], f"{rows.name}.turned")
        if not product.parameter.endswith("down_proj.weight"):
            return rows
        columns = self._weights.shapes[product.parameter][1]
        block = inner_block(columns)
        cut, whole = (
            constant(self._model, f"rows_of_{size}", np.array([-1, size], np.int64))
            for size in (block, columns)
        )
        matrix = constant(self._model, "hadamard", hadamard(block).numpy())
        blocks = node(nodes, "Reshape", [rows, cut], f"{rows.name}.blocks")
        blocks = node(nodes, "MatMul", [blocks, matrix], f"{rows.name}.turned_blocks")
        return node(nodes, "Reshape", [blocks, whole], f"{rows.name}.turned")

    def _row_zero_points(self, product: Product, nodes: list[ir.Node]) -> ir.Value:
        """128 for each row, uint8 [N, 1] or [R, 1], made once."""
        head = is_table(product.parameter)
        kind = "R" if head else "N"
        if kind not in self._zero_points:
            inputs = {value.name: value for value in self._model.graph.inputs}
            ids = inputs["logits_rows" if head else "input_ids"]
            first = node(nodes, "Sub", [ids, ids], f"{ids.name}.zeros")
            table = constant(
                self._model, f"{kind}.zero_point", np.full((1, 1), ZERO_POINT, np.uint8)
            )
            self._zero_points[kind] = node(nodes, "Gather", [table, first], f"{kind}.zero_points")
        return self._zero_points[kind]

    def _factor(self, product: Product, nodes: list[ir.Node]) -> ir.Value:
        """The matrix [K, N'] of a product."""
        name, _ = self._weights.names(product.parameter)
        if not product.twin:
            return initializer(self._model, name, self._weights.layout[name])
        twin = initializer(self._model, f"{name}{TWIN}", self._weights.layout[name], of=name)
        return node(nodes, "Transpose", [twin], f"{name}.turned")

    def _scales(self, parameter: str) -> ir.Value:
        _, name = self._weights.names(parameter)
        return initializer(self._model, name, self._weights.layout[name])

    def _widen(self, gather: ir.Node, parameter: str) -> None:
        """Rows of the embedding are looked up as bytes, and multiplied with their scales."""
        codes_name, _ = self._weights.names(parameter)
        codes = initializer(self._model, codes_name, self._weights.layout[codes_name])
        ids = gather.inputs[1]
        nodes: list[ir.Node] = []
        result = like(gather.outputs[0])
        found = node(nodes, "Gather", [codes, ids], f"{codes_name}.rows")
        wide = node(nodes, "Cast", [found], f"{codes_name}.wide", to=ir.DataType.FLOAT.value)
        scale = node(nodes, "Gather", [self._scales(parameter), ids], f"{codes_name}.row_scales")
        column = node(nodes, "Reshape", [scale, self._column], f"{codes_name}.row_scale")
        nodes.append(ir.Node("", "Mul", [wide, column], outputs=[result]))
        replace(self._model, gather, nodes, result)
