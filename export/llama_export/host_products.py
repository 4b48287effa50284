"""What the passes for 8 and for 4 bits share: the products of the CPU's graph, and how it grows.

Both begin where ``passes`` ends: products are Gemm, some with the residual as a third input, and
where embedding and head are one matrix the head reads a twin of it. Where the bytes lie that the
new initializers stand for is ``host_weights``' to say.

Shape letters are those of ``llama_runtime.contract``; a product's matrix is [N', K].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from llama_export.passes import STORED_AS
from llama_export.weight_file import NUMPY_TYPES, Stored

CONSTANT = "constant"  # a note of an initializer that is part of the arithmetic, not of the model


@dataclass(frozen=True, slots=True)
class Product:
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


def products(model: ir.Model) -> Iterator[Product]:
    """Every product with a matrix of the model, in the graph's order."""
    for gemm in [node for node in model.graph if node.op_type == "Gemm"]:
        weight = gemm.inputs[1]
        if weight is None or weight.name is None:
            continue
        parameter = weight.meta.get(STORED_AS, weight.name)
        residual = gemm.inputs[2] if len(gemm.inputs) > 2 else None
        yield Product(gemm, parameter, parameter != weight.name, residual)


def embeddings(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """The node that looks rows of the embedding up, and the parameter's name."""
    for gather in [node for node in model.graph if node.op_type == "Gather"]:
        table = gather.inputs[0]
        if table is not None and table.name is not None and is_table(table.name):
            yield gather, table.name


def is_table(parameter: str) -> bool:
    """Whether it is an embedding or a head."""
    return parameter.endswith(("embed_tokens.weight", "lm_head.weight"))


def initializer(model: ir.Model, name: str, stored: Stored, of: str | None = None) -> ir.Value:
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


def constant(model: ir.Model, name: str, value: np.ndarray) -> ir.Value:
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


def node(
    nodes: list[ir.Node], op: str, inputs: list[ir.Value | None], name: str, **attributes: int
) -> ir.Value:
    """Add a node of the standard with one result, and give that."""
    result = ir.Value(name=name)
    attrs = [ir.AttrInt64(key, value) for key, value in attributes.items()]
    nodes.append(ir.Node("", op, inputs, attrs, outputs=[result]))
    return result


def replace(model: ir.Model, old: ir.Node, nodes: list[ir.Node], result: ir.Value) -> None:
    """Put nodes in the place of one with one result."""
    ir.convenience.replace_nodes_and_values(
        model.graph, old, [old], nodes, [old.outputs[0]], [result]
    )


def drop_unused(model: ir.Model) -> None:
    """Forget the initializers that nothing reads any more: those of the wide weights."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]


def like(value: ir.Value) -> ir.Value:
    """One with the same name, type and shape, made by nobody yet."""
    return ir.Value(name=value.name, type=value.type, shape=value.shape)
