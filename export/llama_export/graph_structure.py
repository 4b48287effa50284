"""Is a saved graph for a GPU what the contract says? For hosts that can't run it.

A graph that is traced and changed by passes can go wrong in few ways that its structure doesn't
show. What the contract and the weight file say is compared with the file on disk, entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from llama_export.cache_passes import KV_SCALE
from llama_export.encoders import int4_names
from llama_export.errors import ExportError
from llama_export.precision import PRODUCTS, Precision
from llama_export.tensorrt_structure import check_tensorrt
from llama_export.weight_file import Layout, Tag, stored_layout, weight_regions
from llama_runtime.contract import Geometry, TensorSpec
from llama_runtime.errors import BackendError
from llama_runtime.graph_file import OPERATORS as RUNTIME_OPERATORS
from llama_runtime.graph_file import TENSORRT_OPERATORS, check_graph

ATTENTION, PRODUCT, PRODUCT_4_BITS = "PagedAttention", "MatMul", "MatMulNBits"
OPERATORS = {
    *("Add", "Gather", "Gemm", "Mul", "Reshape", "Sigmoid", "SimplifiedLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", ATTENTION),
}
# Inputs of PagedAttention by the contract's names; the two caches stand before them, and the RoPE
# tables between the two groups.
_PLACES = {
    5: "cumulative_sequence_length",
    6: "past_seqlens",
    7: "block_table",
    8: "rope_cos",
    9: "rope_sin",
    10: "slot_mapping",
    16: "attention_metadata",
}
# What an 8-bit cache adds to it: scales of keys and values, and what shares one.
_SCALES = {14: KV_SCALE, 15: KV_SCALE}
_SHARED: dict[str, object] = {"k_quant_type": b"PER_TENSOR", "v_quant_type": b"PER_TENSOR"}
_ONE = np.ones(1, "<f4").tobytes()
_MATRICES = (*PRODUCTS, *(int4_names(name)[0] for name in PRODUCTS))
_INTEGERS = {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
_ONNX_TAGS: dict[Tag, int] = {
    "F32": onnx.TensorProto.FLOAT,
    "F16": onnx.TensorProto.FLOAT16,
    "BF16": onnx.TensorProto.BFLOAT16,
    "U8": onnx.TensorProto.UINT8,
    "I8": onnx.TensorProto.INT8,
}
_ONNX_TYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float8e4m3fn": onnx.TensorProto.FLOAT8E4M3FN,
    "int64": onnx.TensorProto.INT64,
    "int32": onnx.TensorProto.INT32,
}


def check_structure(
    path: Path, weights: Path, geometry: Geometry, precision: Precision, layout: Layout
) -> None:
    """Compare a saved graph with the contract and with its weight file.

    Args:
        path: the ONNX file.
        weights: the weight file beside it.
        geometry: the model's numbers.
        precision: a recipe for CUDA or TensorRT.
        layout: what the weight file must hold.

    Raises:
        ExportError: says what is not as it must be.
    """
    is_tensorrt = precision.target == "tensorrt"
    try:
        check_graph(path, TENSORRT_OPERATORS if is_tensorrt else RUNTIME_OPERATORS)
    except BackendError as error:
        raise ExportError(f"the runtime will refuse the graph: {error}") from error
    if stored_layout(weights) != dict(layout):
        raise ExportError(f"{weights} holds other tensors than a bundle in {precision.name}")
    graph: Any = onnx.load(path, load_external_data=False).graph
    dialect = precision.dialect
    num_layers = geometry.num_layers
    _check_values(graph.input, (*dialect.inputs, *dialect.cache_inputs(num_layers)), geometry)
    _check_values(graph.output, (dialect.logits, *dialect.cache_outputs(num_layers)), geometry)
    scaled = precision.cache is not None
    if is_tensorrt:
        check_tensorrt(graph, geometry, int4=precision.int4)
    else:
        product = PRODUCT_4_BITS if precision.int4 else PRODUCT
        _check_operators(graph, product)
        _check_products(graph, product)
        _check_attention(graph, geometry, scaled=scaled)
    _check_initializers(graph, layout, weights.name, scaled=scaled)


def _check_values(values: Sequence[Any], specs: Sequence[TensorSpec], geometry: Geometry) -> None:
    """Names, types and axes of the inputs or the outputs, in order."""
    sizes = {
        "K": geometry.num_kv_heads,
        "D": geometry.head_dim,
        "V": geometry.vocab_size,
        "3": 3,
    }
    found = [_signature(value) for value in values]
    wanted = [
        (spec.name, _ONNX_TYPES[spec.dtype], [sizes.get(axis, axis) for axis in spec.axes])
        for spec in specs
    ]
    for has, must in zip(found, wanted, strict=False):
        if has != must:
            raise ExportError(f"the graph has {has} where the contract has {must}")
    if len(found) != len(wanted):
        raise ExportError(f"the graph has {len(found)} inputs or outputs, not {len(wanted)}")


def _signature(value: Any) -> tuple[str, int, list[object]]:
    tensor = value.type.tensor_type
    axes = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    return value.name, tensor.elem_type, axes


def _check_operators(graph: Any, product: str) -> None:
    unknown = sorted({node.op_type for node in graph.node} - OPERATORS - {product})
    if unknown:
        raise ExportError(f"the graph has operators that no pass makes: {', '.join(unknown)}")


def _check_products(graph: Any, product: str) -> None:
    """Each product of a layer is the operator that its pass makes, of its matrix; no other is."""
    for node in graph.node:
        matrices = [name for name in node.input if name.endswith(_MATRICES)]
        if not matrices and node.op_type != product:
            continue
        if node.op_type != product or list(node.input)[1:2] != matrices:
            raise ExportError(
                f"the graph has {node.op_type} of {', '.join(node.input)} where {product} of a "
                "layer's matrix belongs"
            )


def _check_attention(graph: Any, geometry: Geometry, *, scaled: bool) -> None:
    """One attention a layer, which gives back the cache that it was given."""
    nodes = [node for node in graph.node if node.op_type == ATTENTION]
    if len(nodes) != geometry.num_layers:
        raise ExportError(f"the graph has {len(nodes)} attentions in {geometry.num_layers} layers")
    heads: dict[str, object] = {
        "num_heads": geometry.num_heads,
        "kv_num_heads": geometry.num_kv_heads,
        "do_rotary": 1,
        **(_SHARED if scaled else {}),
    }
    for layer, node in enumerate(nodes):
        places = _PLACES | {
            3: f"past_key_values.{layer}.key",
            4: f"past_key_values.{layer}.value",
            **(_SCALES if scaled else {}),
        }
        inputs = {i: name for i, name in enumerate(node.input) if name and i > 0}
        outputs = list(node.output)[1:]
        if inputs != places or outputs != [f"present.{layer}.key", f"present.{layer}.value"]:
            raise ExportError(f"the attention of layer {layer} reads {inputs}, gives {outputs}")
        attributes = {
            attribute.name: onnx.helper.get_attribute_value(attribute)
            for attribute in node.attribute
        }
        if attributes != heads:
            raise ExportError(f"the attention of layer {layer} has {attributes}, not {heads}")


def _check_initializers(graph: Any, layout: Layout, weight_file: str, *, scaled: bool) -> None:
    """Every tensor of the file is an initializer, used, and the same; and there are no others.

    But for whole numbers, and the scale of an 8-bit cache.
    """
    used = {name for node in graph.node for name in node.input}
    regions = weight_regions(layout)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    missing = sorted(name for name in regions if name not in stored or name not in used)
    if missing:
        raise ExportError(f"the graph doesn't use the weights {', '.join(missing[:5])}")
    for name, tensor in stored.items():
        place = {entry.key: entry.value for entry in tensor.external_data}
        if scaled and name == KV_SCALE:
            scale = tensor.data_type, list(tensor.dims), place, tensor.raw_data
            if scale != (onnx.TensorProto.FLOAT, [1], {}, _ONE):
                raise ExportError(f"the graph has {scale} as the scale of its cache, not one 1")
            continue
        if name not in regions:
            if place or tensor.data_type not in _INTEGERS:
                raise ExportError(f"the graph has weights that the file doesn't: {name}")
            continue
        region = regions[name]
        kind, shape = _ONNX_TAGS[region.stored.tag], region.stored.shape
        if tensor.data_type == onnx.TensorProto.INT4 and region.stored.tag == "U8":
            kind, shape = tensor.data_type, (shape[0], 2 * shape[1] * shape[2])  # by blocks there
        has = (tensor.data_type, tuple(tensor.dims), place)
        must = (
            kind,
            shape,
            {
                "location": weight_file,
                "offset": str(region.offset),
                "length": str(region.length),
            },
        )
        if has != must:
            raise ExportError(f"the graph has {name} as {has}, the weight file as {must}")
