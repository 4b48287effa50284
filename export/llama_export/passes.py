"""Changes to a traced graph, each with a name and a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from llama_export.cache_passes import quantise_paged_cache
from llama_export.gpu_products import (
    dequantise_products,
    quantise_products,
    transpose_products,
)
from llama_export.graph_edits import STORED_AS, like, replace
from llama_export.precision import Precision

TWIN = ".factor"  # behind the name of an initializer that has another's bytes


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
        result = like(add.outputs[0])
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


def fuse_skip_norms(model: ir.Model) -> int:
    """Let a norm add the residual itself, and give the sum back: one kernel instead of two.

    ``RMSNormalization(Add(x, y), w)`` becomes com.microsoft.SkipSimplifiedLayerNormalization. ONNX
    Runtime fuses neither this nor opset 23's operator for CUDA, so a norm that stands alone becomes
    SimplifiedLayerNormalization, which it has a kernel for.

    Source: the operators' schemas in ONNX Runtime 1.31 (docs/ContribOperators.md).

    Args:
        model: changed in place.

    Returns:
        How many were fused.
    """
    fused = 0
    for norm in [node for node in model.graph if node.op_type == "RMSNormalization"]:
        source, weight = norm.inputs
        add = None if source is None else source.producer()
        epsilon = norm.attributes["epsilon"]
        result = like(norm.outputs[0])
        if source is None or add is None or add.op_type != "Add":
            attributes = [epsilon, ir.AttrInt64("axis", -1), ir.AttrInt64("stash_type", 1)]
            alone = ir.Node(
                "", "SimplifiedLayerNormalization", norm.inputs, attributes, outputs=[result]
            )
            replace(model, norm, [alone], result)
            continue
        total = like(source)
        outputs = [result, ir.Value(name=""), ir.Value(name=""), total]
        skip = ir.Node(
            "com.microsoft",
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, weight],
            [epsilon],
            outputs=outputs,
        )
        ir.convenience.replace_nodes_and_values(
            model.graph, norm, [norm, add], [skip], [norm.outputs[0], source], [result, total]
        )
        fused += 1
    return fused


def separate_factors(model: ir.Model) -> int:
    """Let a product have its matrix to itself where rows of it are gathered too.

    ONNX Runtime packs the matrix of a product anew for its CPU kernels and drops the original,
    unless something else reads it. So a tied embedding would stay in memory twice. Under two names
    over the same bytes of the weight file, one is dropped and of the other only the rows that are
    looked up are ever read. On a GPU nothing is packed, and two names would be two copies.

    Args:
        model: changed in place; the new initializer's notes say whose bytes it has.

    Returns:
        How many initializers were made.
    """
    made = 0
    for name, value in list(model.graph.initializers.items()):
        uses = list(value.uses())
        products = [use for use in uses if use.node.op_type == "Gemm"]
        if not products or not any(use.node.op_type == "Gather" for use in uses):
            continue
        twin = ir.Value(
            name=f"{name}{TWIN}", type=value.type, shape=value.shape, const_value=value.const_value
        )
        twin.meta[STORED_AS] = name
        model.graph.register_initializer(twin)
        for node, index in products:
            node.replace_input_with(index, twin)
        made += 1
    return made


# What a dialect's graph goes through after it was traced, in this order.
PASSES: dict[str, tuple[Callable[[ir.Model], int], ...]] = {
    "slots": (fold_residuals, separate_factors),
    "paged": (fuse_skip_norms,),
    "tensorrt": (),
}


def passes_of(precision: Precision) -> Iterator[Callable[[ir.Model], int]]:
    """What it goes through after that, for how weights and cache are stored."""
    if precision.transposed:
        yield transpose_products
    if precision.int4:
        yield dequantise_products if precision.target == "tensorrt" else quantise_products
    if precision.cache is not None and precision.target == "cuda":
        yield quantise_paged_cache
