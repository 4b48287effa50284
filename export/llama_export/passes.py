"""Changes to a traced graph, each with a name and a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from llama_export.precision import INT4_BLOCK, KV_SCALE, PRODUCTS, Precision, int4_names

STORED_AS = "stored_as"  # what an initializer's notes name the tensor by that holds its bytes
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
        result = _like(add.outputs[0])
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
        result = _like(norm.outputs[0])
        if source is None or add is None or add.op_type != "Add":
            attributes = [epsilon, ir.AttrInt64("axis", -1), ir.AttrInt64("stash_type", 1)]
            alone = ir.Node(
                "", "SimplifiedLayerNormalization", norm.inputs, attributes, outputs=[result]
            )
            ir.convenience.replace_nodes_and_values(
                model.graph, norm, [norm], [alone], [norm.outputs[0]], [result]
            )
            continue
        total = _like(source)
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


def quantise_products(model: ir.Model) -> int:
    """Let the products of the layers read 4-bit weights: Gemm becomes MatMulNBits.

    Their values and scales get the names of ``precision.int4_names``; the bytes lie in the weight
    file. Embedding and head stay as they are: they matter most to the likeliest token.

    Source: the operator's schema in ONNX Runtime 1.32 (docs/ContribOperators.md).

    Args:
        model: changed in place; traced with fp16 activations.

    Returns:
        How many products were changed.
    """
    changed = 0
    for gemm, weight, (rows, columns) in _layer_products(model):
        blocks = columns // INT4_BLOCK
        places = (
            np.broadcast_to(np.uint8(0), (rows, blocks, INT4_BLOCK // 2)),
            np.broadcast_to(np.float16(0), (rows, blocks)),
        )
        stored = [
            ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,
                const_value=tensor,
            )
            for name, tensor in zip(int4_names(weight.name), map(ir.tensor, places), strict=True)
        ]
        for value in stored:
            model.graph.register_initializer(value)
        sizes = {"K": columns, "N": rows, "bits": 4, "block_size": INT4_BLOCK}
        result = _like(gemm.outputs[0])
        product = ir.Node(
            "com.microsoft",
            "MatMulNBits",
            [gemm.inputs[0], *stored],
            [ir.AttrInt64(name, size) for name, size in sizes.items()],
            outputs=[result],
            name=gemm.name,
        )
        ir.convenience.replace_nodes_and_values(
            model.graph, gemm, [gemm], [product], [gemm.outputs[0]], [result]
        )
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
        values = np.broadcast_to(np.zeros((), ml_dtypes.int4), (rows, columns))
        scales = np.broadcast_to(np.float16(0), (rows, columns // INT4_BLOCK))
        stored = [
            ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=tensor.shape,
                const_value=tensor,
            )
            for name, tensor in zip(
                int4_names(weight.name), map(ir.tensor, (values, scales)), strict=True
            )
        ]
        for value in stored:
            model.graph.register_initializer(value)
        wide = ir.Node(
            "",
            "DequantizeLinear",
            stored,
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
        result = _like(gemm.outputs[0])
        product = ir.Node("", "MatMul", [gemm.inputs[0], turned], outputs=[result], name=gemm.name)
        ir.convenience.replace_nodes_and_values(
            model.graph, gemm, [gemm], [product], [gemm.outputs[0]], [result]
        )
        del model.graph.initializers[weight.name]
        model.graph.register_initializer(turned)
        changed += 1
    return changed


def quantise_cache(model: ir.Model) -> int:
    """Let PagedAttention keep keys and values in 8 bits, as float8e4m3fn.

    What is stored is divided by a scale. That of all layers is 1, as in vLLM unless it is told: the
    type reaches 448, which keys and values of Llamas lie far below, and its 3 bits of mantissa are
    as exact for all numbers down to 2^-6.

    Source: the operator's schema in ONNX Runtime 1.31 (docs/ContribOperators.md).

    Args:
        model: changed in place.

    Returns:
        How many attentions were changed.
    """
    attentions = [node for node in model.graph if node.op_type == "PagedAttention"]
    scale = ir.Value(
        name=KV_SCALE,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape((1,)),
        const_value=ir.tensor(np.ones(1, np.float32), name=KV_SCALE),
    )
    if attentions:
        model.graph.register_initializer(scale)
    for node in attentions:
        for value in (*node.inputs[3:5], *node.outputs[1:]):
            if value is not None:
                value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
        for part, place in (("k", 14), ("v", 15)):
            node.replace_input_with(place, scale)
            node.attributes.add(ir.AttrString(f"{part}_quant_type", "PER_TENSOR"))
    return len(attentions)


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


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


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
        yield quantise_cache
