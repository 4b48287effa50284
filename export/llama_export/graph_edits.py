"""How passes change a graph: nodes in the place of others, and new initializers.

An initializer stands for a tensor of the weight file, that of its own name unless a note of it
(``STORED_AS``) names another; or, with the note ``CONSTANT``, for numbers of the arithmetic itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from llama_export.weight_file import NUMPY_TYPES, Stored

STORED_AS = "stored_as"  # what an initializer's notes name the tensor by that holds its bytes
CONSTANT = "constant"  # a note of an initializer that is part of the arithmetic, not of the model


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


def like(value: ir.Value) -> ir.Value:
    """One with the same name, type and shape, made by nobody yet."""
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def initializer(model: ir.Model, name: str, stored: Stored, of: str | None = None) -> ir.Value:
    """An initializer whose bytes lie in the weight file, under its own name or ``of``."""
    place = np.broadcast_to(np.zeros((), NUMPY_TYPES[stored.tag]), stored.shape)
    value = registered(model, name, place)
    if of is not None:
        value.meta[STORED_AS] = of
    return value


def constant(model: ir.Model, name: str, numbers: NDArray[Any]) -> ir.Value:
    """A small initializer that is part of the arithmetic."""
    value = registered(model, name, numbers)
    value.meta[CONSTANT] = True
    return value


def registered(model: ir.Model, name: str, numbers: NDArray[Any]) -> ir.Value:
    """The initializer of that name, made with these numbers if there is none yet."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(numbers, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def drop_unused(model: ir.Model) -> None:
    """Forget the initializers that nothing reads any more: those of the wide weights."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
