"""Changes to the CPU's graph that let it read 8-bit and 4-bit weights.

Both begin where ``passes`` ends: products are Gemm, some with the residual as a third input, and
where embedding and head are one matrix the head reads a twin of it. Where the bytes lie that the
new initializers stand for is ``host_weights``' to say.

Shape letters are those of ``llama_runtime.contract``; a product's matrix is [N', K].

Source of the operators: their schemas in ONNX Runtime 1.32 (docs/ContribOperators.md), and the
standard's specifications (onnx.ai, opset 23).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llama_export.host_weights import BlockWeights, Int8Weights
from llama_export.passes import STORED_AS, TWIN
from llama_export.quantise.rotation import NORM_STEP, hadamard, inner_block
from llama_export.quantise.rounding import HEAD_TURN
from llama_export.weight_file import NUMPY_TYPES, Stored

CONSTANT = "constant"  # a note of an initializer that is part of the arithmetic, not of the model
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
    for product in list(_products(model)):
        codes, scales, zero_points = _initializers(model, weights, product.parameter, product.twin)
        rows, columns = weights.shapes[product.parameter]
        sizes = {
            "K": columns,
            "N": rows,
            "bits": weights.bits(product.parameter),
            "block_size": weights.block,
            "accuracy_level": 4,
        }
        nodes: list[ir.Node] = []
        result = _like(product.gemm.outputs[0])
        last, residual = result, product.residual
        offsets = weights.offsets_name(product.parameter)
        if residual is not None or offsets is not None:
            last = ir.Value(name=f"{result.name}.product", type=result.type, shape=result.shape)
        nodes.append(
            ir.Node(
                "com.microsoft",
                "MatMulNBits",
                [product.rows, codes, scales, zero_points],
                [ir.AttrInt64(name, size) for name, size in sizes.items()],
                outputs=[last],
                name=product.gemm.name,
            )
        )
        if offsets is not None:
            sums = block_sums.of(product.rows, columns // weights.block, nodes)
            matrix = _initializer(model, offsets, weights.layout[offsets])
            whole = result
            if residual is not None:
                whole = ir.Value(name=f"{result.name}.whole", type=result.type, shape=result.shape)
            nodes.append(ir.Node("", "Gemm", [sums, matrix, last], outputs=[whole]))
            last = whole
        if residual is not None:
            nodes.append(ir.Node("", "Add", [last, residual], outputs=[result]))
        _replace(model, product.gemm, nodes, result)
        changed += 1
    for gather, name in _embeddings(model):
        codes, scales, zero_points = _initializers(model, weights, name)
        result = _like(gather.outputs[0])
        sizes = {"bits": 8, "block_size": weights.block, "gather_axis": 0, "quantize_axis": 1}
        node = ir.Node(
            "com.microsoft",
            "GatherBlockQuantized",
            [codes, gather.inputs[1], scales, zero_points],
            [ir.AttrInt64(name, size) for name, size in sizes.items()],
            outputs=[result],
        )
        _replace(model, gather, [node], result)
    _drop_unused(model)
    return changed


@dataclass(frozen=True, slots=True)
class _Product:
    """One product of the traced graph.

    Attributes:
        gemm: its node.
        parameter: whose matrix it reads.
        twin: whether it shares that matrix's bytes with the embedding.
        residual: what it adds to, or None.
    """

    gemm: ir.Node
    parameter: str
    twin: bool
    residual: ir.Value | None

    @property
    def rows(self) -> ir.Value:
        """What is multiplied, [N, K] or [R, K]."""
        value = self.gemm.inputs[0]
        assert value is not None
        return value


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
            cut = _constant(
                self._model,
                f"blocks_{num_blocks}",
                np.array([-1, num_blocks, self._block], np.int64),
            )
            axis = _constant(self._model, "last_axis", np.array([-1], np.int64))
            blocks = _node(nodes, "Reshape", [rows, cut], f"{rows.name}.blocks")
            sums = _node(nodes, "ReduceSum", [blocks, axis], f"{rows.name}.sums", keepdims=0)
            self._made[rows] = sums
        return self._made[rows]


class _RowQuantiser:
    """The work of ``quantise_rows``, and what it shares between the layers."""

    def __init__(self, model: ir.Model, weights: Int8Weights) -> None:
        self._model, self._weights = model, weights
        self._one = _constant(model, "one", np.array(1, np.float32))
        self._step = _constant(model, "row_step", np.array(1 / STEPS, np.float32))
        self._norm_step = _constant(model, "norm_step", np.array(NORM_STEP, np.float32))
        self._zero_point = _constant(model, "zero_point", np.array(ZERO_POINT, np.uint8))
        self._last_axis = _constant(model, "last_axis", np.array([-1], np.int64))
        self._column = _constant(model, "one_column", np.array([-1, 1], np.int64))
        self._normed: dict[ir.Value, ir.Value] = {}  # the codes of what comes out of norms
        self._zero_points: dict[str, ir.Value] = {}

    def run(self) -> int:
        changed = 0
        for product in list(_products(self._model)):
            self._change(product)
            changed += 1
        for gather, name in _embeddings(self._model):
            self._widen(gather, name)
        _drop_unused(self._model)
        return changed

    def _change(self, product: _Product) -> None:
        nodes: list[ir.Node] = []
        result = _like(product.gemm.outputs[0])
        producer = product.rows.producer()
        # A head's rows have scales of their own, which are no numbers where the rows are none: what
        # went wrong in a sequence must be seen in its logits.
        normed = producer is not None and producer.op_type == "RMSNormalization"
        if normed and not _is_head(product.parameter):
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
        _replace(self._model, product.gemm, nodes, result)

    def _multiply(
        self,
        product: _Product,
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

    def _normed_codes(self, product: _Product, nodes: list[ir.Node]) -> ir.Value:
        """Codes [N, E] of what comes out of a norm, made once for all products that read them."""
        assert product.residual is None
        rows = product.rows
        if rows not in self._normed:
            inputs = [rows, self._norm_step, self._zero_point]
            self._normed[rows] = _node(nodes, "QuantizeLinear", inputs, f"{rows.name}.codes")
        return self._normed[rows]

    def _row_codes(self, product: _Product, nodes: list[ir.Node]) -> tuple[ir.Value, ir.Value]:
        """Codes [N, K] of a product's rows, turned, and their scales [N, 1]."""
        rows = self._turned(product, nodes)
        name = rows.name
        magnitudes = _node(nodes, "Abs", [rows], f"{name}.magnitudes")
        largest = _node(nodes, "ReduceMax", [magnitudes, self._last_axis], f"{name}.largest")
        scale = _node(nodes, "Mul", [largest, self._step], f"{name}.scale")
        zero_points = self._row_zero_points(product, nodes)
        codes = _node(
            nodes,
            "QuantizeLinear",
            [rows, scale, zero_points],
            f"{name}.codes",
            axis=1,
            block_size=self._weights.shapes[product.parameter][1],
        )
        return codes, scale

    def _turned(self, product: _Product, nodes: list[ir.Node]) -> ir.Value:
        """A product's rows as its matrix expects them."""
        rows = product.rows
        if product.twin:
            turn = _initializer(self._model, HEAD_TURN, self._weights.layout[HEAD_TURN])
            return _node(nodes, "MatMul", [rows, turn], f"{rows.name}.turned")
        if not product.parameter.endswith("down_proj.weight"):
            return rows
        columns = self._weights.shapes[product.parameter][1]
        block = inner_block(columns)
        cut, whole = (
            _constant(self._model, f"rows_of_{size}", np.array([-1, size], np.int64))
            for size in (block, columns)
        )
        matrix = _constant(self._model, "hadamard", hadamard(block).numpy())
        blocks = _node(nodes, "Reshape", [rows, cut], f"{rows.name}.blocks")
        blocks = _node(nodes, "MatMul", [blocks, matrix], f"{rows.name}.turned_blocks")
        return _node(nodes, "Reshape", [blocks, whole], f"{rows.name}.turned")

    def _row_zero_points(self, product: _Product, nodes: list[ir.Node]) -> ir.Value:
        """128 for each row, uint8 [N, 1] or [R, 1], made once."""
        head = _is_head(product.parameter)
        kind = "R" if head else "N"
        if kind not in self._zero_points:
            inputs = {value.name: value for value in self._model.graph.inputs}
            ids = inputs["logits_rows" if head else "input_ids"]
            first = _node(nodes, "Sub", [ids, ids], f"{ids.name}.zeros")
            table = _constant(
                self._model, f"{kind}.zero_point", np.full((1, 1), ZERO_POINT, np.uint8)
            )
            self._zero_points[kind] = _node(nodes, "Gather", [table, first], f"{kind}.zero_points")
        return self._zero_points[kind]

    def _factor(self, product: _Product, nodes: list[ir.Node]) -> ir.Value:
        """The matrix [K, N'] of a product."""
        name, _ = self._weights.names(product.parameter)
        if not product.twin:
            return _initializer(self._model, name, self._weights.layout[name])
        twin = _initializer(self._model, f"{name}{TWIN}", self._weights.layout[name], of=name)
        return _node(nodes, "Transpose", [twin], f"{name}.turned")

    def _scales(self, parameter: str) -> ir.Value:
        _, name = self._weights.names(parameter)
        return _initializer(self._model, name, self._weights.layout[name])

    def _widen(self, gather: ir.Node, parameter: str) -> None:
        """Rows of the embedding are looked up as bytes, and multiplied with their scales."""
        codes_name, _ = self._weights.names(parameter)
        codes = _initializer(self._model, codes_name, self._weights.layout[codes_name])
        ids = gather.inputs[1]
        nodes: list[ir.Node] = []
        result = _like(gather.outputs[0])
        found = _node(nodes, "Gather", [codes, ids], f"{codes_name}.rows")
        wide = _node(nodes, "Cast", [found], f"{codes_name}.wide", to=ir.DataType.FLOAT.value)
        scale = _node(nodes, "Gather", [self._scales(parameter), ids], f"{codes_name}.row_scales")
        column = _node(nodes, "Reshape", [scale, self._column], f"{codes_name}.row_scale")
        nodes.append(ir.Node("", "Mul", [wide, column], outputs=[result]))
        _replace(self._model, gather, nodes, result)


def _products(model: ir.Model) -> Iterator[_Product]:
    """Every product with a matrix of the model, in the graph's order."""
    for gemm in [node for node in model.graph if node.op_type == "Gemm"]:
        weight = gemm.inputs[1]
        if weight is None or weight.name is None:
            continue
        parameter = weight.meta.get(STORED_AS, weight.name)
        residual = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        yield _Product(gemm, parameter, parameter != weight.name, residual)


def _embeddings(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """The node that looks rows of the embedding up, and the parameter's name."""
    for gather in [node for node in model.graph if node.op_type == "Gather"]:
        table = gather.inputs[0]
        if table is not None and table.name is not None and _is_head(table.name):
            yield gather, table.name


def _is_head(parameter: str) -> bool:
    return parameter.endswith(("embed_tokens.weight", "lm_head.weight"))


def _initializers(
    model: ir.Model, weights: BlockWeights, parameter: str, twin: bool = False
) -> tuple[ir.Value, ...]:
    """Codes, scales and zero points of a parameter.

    The codes of an embedding that is the head too have two names, so that ONNX Runtime may pack
    those of the product and drop them.
    """
    codes, *others = weights.names(parameter)
    stored = weights.layout[codes]
    if not twin and _is_head(parameter) and not parameter.startswith("lm_head"):
        stored = Stored(stored.tag, (stored.shape[0], stored.shape[1] * stored.shape[2]))
        first = _initializer(model, f"{codes}.rows", stored, of=codes)
    else:
        first = _initializer(model, codes, stored)
    return (first, *(_initializer(model, name, weights.layout[name]) for name in others))


def _initializer(model: ir.Model, name: str, stored: Stored, of: str | None = None) -> ir.Value:
    """An initializer whose bytes lie in the weight file, under its own name or ``of``."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    place = np.broadcast_to(np.zeros((), NUMPY_TYPES[stored.tag]), stored.shape)
    tensor = ir.tensor(place, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    if of is not None:
        value.meta[STORED_AS] = of
    model.graph.register_initializer(value)
    return value


def _constant(model: ir.Model, name: str, value: np.ndarray) -> ir.Value:
    """A small initializer that is part of the arithmetic, made once."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(value, name=name)
    constant = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    constant.meta[CONSTANT] = True
    model.graph.register_initializer(constant)
    return constant


def _node(
    nodes: list[ir.Node], op: str, inputs: list[ir.Value | None], name: str, **attributes: int
) -> ir.Value:
    """Add a node of the standard with one result, and give that."""
    result = ir.Value(name=name)
    attrs = [ir.AttrInt64(key, value) for key, value in attributes.items()]
    nodes.append(ir.Node("", op, inputs, attrs, outputs=[result]))
    return result


def _replace(model: ir.Model, old: ir.Node, nodes: list[ir.Node], result: ir.Value) -> None:
    ir.convenience.replace_nodes_and_values(
        model.graph, old, [old], nodes, [old.outputs[0]], [result]
    )


def _drop_unused(model: ir.Model) -> None:
    """Forget the initializers that nothing reads any more: those of the wide weights."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)
