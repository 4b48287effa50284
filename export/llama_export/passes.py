"""Changes to a traced graph, each with a name and a reason."""

from __future__ import annotations

import onnx_ir as ir


def fold_residuals(model: ir.Model) -> int:
    """Let the product that is added to a residual add it itself: Gemm has an input for that.

    ``Add(x, Gemm(a, w))`` becomes ``Gemm(a, w, x)``, which saves a kernel and a pass over the rows
    in both halves of every layer. ONNX Runtime doesn't fuse them by itself.

    Args:
        model: changed in place.

    Returns:
        How many were folded.
    """
    folded = 0
    for add in [node for node in model.graph if node.op_type == "Add"]:
        residual, product = add.inputs
        gemm = None if product is None else product.producer()
        if gemm is None or gemm.op_type != "Gemm" or len(gemm.inputs) > 2:
            continue
        if len(gemm.outputs[0].uses()) > 1:  # somebody else wants the product without the sum
            continue
        result = ir.Value(
            name=add.outputs[0].name, type=add.outputs[0].type, shape=add.outputs[0].shape
        )
        fused = ir.Node(
            "",
            "Gemm",
            inputs=[*gemm.inputs, residual],
            attributes=gemm.attributes.values(),
            outputs=[result],
            name=gemm.name,
        )
        ir.convenience.replace_nodes_and_values(
            model.graph, add, [gemm, add], [fused], [add.outputs[0]], [result]
        )
        folded += 1
    return folded


def separate_factors(model: ir.Model) -> dict[str, str]:
    """Let a product have its matrix to itself where rows of it are gathered too.

    ONNX Runtime packs the matrix of a product anew for its kernels and drops the original, unless
    something else reads it. So a tied embedding would stay in memory twice. Under two names over
    the same bytes of the weight file, one is dropped and of the other only the rows that are
    looked up are ever read.

    Args:
        model: changed in place.

    Returns:
        The new initializers and those that they repeat, by name.
    """
    twins = {}
    for name, value in list(model.graph.initializers.items()):
        uses = list(value.uses())
        products = [use for use in uses if use.node.op_type == "Gemm"]
        if not products or not any(use.node.op_type == "Gather" for use in uses):
            continue
        twin = ir.Value(
            name=f"{name}.factor", type=value.type, shape=value.shape, const_value=value.const_value
        )
        model.graph.register_initializer(twin)
        for node, index in products:
            node.replace_input_with(index, twin)
        twins[f"{name}.factor"] = name
    return twins
