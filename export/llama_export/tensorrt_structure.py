"""Is a saved graph for TensorRT what the contract says? See ``graph_structure``.

TensorRT misunderstands some graphs without a word (its parser drops the lengths that
Attention takes, and aligns a causal mask with the upper left corner). So attention here has one
mask, its causality is off, and every cache is written by a TensorScatter of its own, which becomes
the layer whose output aliases its input.
"""

from __future__ import annotations

from typing import Any

import onnx

from llama_export.encoders import int4_names
from llama_export.errors import ExportError
from llama_export.precision import PRODUCTS
from llama_runtime.contract import Geometry

PARTS = ("key", "value")
SCATTER: dict[str, object] = {"axis": -2, "mode": b"linear"}


def check_tensorrt(graph: Any, geometry: Geometry, *, int4: bool) -> None:
    """Compare the operators of a graph with what the dialect makes of each layer.

    Args:
        graph: of the ``tensorrt`` dialect.
        geometry: the model's numbers.
        int4: whether the products of the layers read 4-bit weights.

    Raises:
        ExportError: says what is not as it must be.
    """
    makers = {output: node for node in graph.node for output in node.output}
    attentions = _of(graph, "Attention")
    if len(attentions) != geometry.num_layers:
        raise ExportError(
            f"the graph has {len(attentions)} attentions in {geometry.num_layers} layers"
        )
    masks: set[str] = set()
    positions: set[str] = set()
    for layer, attention in enumerate(attentions):
        query, *cache, mask = attention.input
        if cache != [f"present.{layer}.{part}" for part in PARTS]:
            raise ExportError(f"the attention of layer {layer} reads {list(attention.input)}")
        if _attributes(attention) != {"is_causal": 0}:
            raise ExportError(f"the attention of layer {layer} has {_attributes(attention)}")
        masks.add(mask)
        new_key, _ = (_written(makers, layer, part) for part in PARTS)
        positions |= {_positions(makers, layer, turned) for turned in (query, new_key)}
    _check_mask(makers, masks, positions)
    _check_products(graph, makers, geometry, int4=int4)


def _written(makers: dict[str, Any], layer: int, part: str) -> str:
    """What is written into a cache of a layer, which nothing else happens to."""
    scatter = makers.get(f"present.{layer}.{part}")
    past = f"past_key_values.{layer}.{part}"
    if scatter is None or scatter.op_type != "TensorScatter":
        raise ExportError(f"present.{layer}.{part} is not {past} with new tokens written into it")
    cache, new, starts = scatter.input
    if (cache, starts, _attributes(scatter)) != (past, "past_lengths", SCATTER):
        raise ExportError(f"{past} is not written behind its tokens, but {_attributes(scatter)}")
    return str(new)


def _positions(makers: dict[str, Any], layer: int, turned: str) -> str:
    """The positions by which queries or keys of a layer are turned."""
    rotation = makers.get(turned)
    if rotation is None or rotation.op_type != "RotaryEmbedding":
        raise ExportError(f"layer {layer} doesn't turn its queries or its keys")
    _, *tables, positions = rotation.input
    if tables != ["rope_cos", "rope_sin"]:
        raise ExportError(f"layer {layer} turns by {tables}")
    return str(positions)


def _check_mask(makers: dict[str, Any], masks: set[str], positions: set[str]) -> None:
    """One mask for all: cells up to the position of the token that looks."""
    found = [makers.get(mask) for mask in masks]
    if len(found) == 1 and found[0] is not None and found[0].op_type == "Unsqueeze":
        compared = makers.get(found[0].input[0])
        if compared is not None and compared.op_type == "LessOrEqual":
            cells, looking = (makers.get(name) for name in compared.input)
            sources = {*looking.input} if looking is not None else set()
            if cells is not None and cells.op_type == "Range" and positions <= sources:
                return
    raise ExportError("attention is not masked by the positions of its tokens, all of it alike")


def _check_products(graph: Any, makers: dict[str, Any], geometry: Geometry, *, int4: bool) -> None:
    """Each matrix of a layer is a factor once, as it is or widened, and the head is one."""
    products = _of(graph, "Gemm")
    found = []
    for product in products:
        factor = product.input[1]
        if factor in makers:
            factor = makers[factor].input[0]
        found.append(factor)
        if _attributes(product).get("transB") != 1 or len(product.input) > 2:
            raise ExportError(f"the product with {factor} is not with its transpose alone")
    kinds = [int4_names(name)[0] if int4 else name for name in PRODUCTS]
    wanted = sum(factor.endswith(tuple(kinds)) for factor in found)
    if len(set(found)) != len(found) or wanted != len(PRODUCTS) * geometry.num_layers:
        raise ExportError(f"{wanted} of {len(found)} products are with the layers' matrices")
    if len(found) != wanted + 1:
        raise ExportError(f"the graph has {len(found) - wanted} products beside those of layers")


def _of(graph: Any, operator: str) -> list[Any]:
    return [node for node in graph.node if node.op_type == operator]


def _attributes(node: Any) -> dict[str, object]:
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
