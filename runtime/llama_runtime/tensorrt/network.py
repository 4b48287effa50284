"""A bundle's graph as a network of TensorRT, and whether TensorRT understood it.

TensorRT's parser gives up parts of an operator that it has no use for, and says so at most in its
log: of Attention it drops the count of valid keys, and takes the wrong corner for causality. Such
an engine runs, and its texts are wrong. So the exporter spells causality as a mask, and here every
layer of the parsed network that this rests on is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_runtime.contract import TENSORRT, DType, Geometry, TensorSpec
from llama_runtime.errors import BackendError, one_line
from llama_runtime.tensorrt.library import Library
from llama_runtime.tensorrt.limits import EngineLimits
from llama_runtime.tensorrt.static_axis import with_static_axis

_TYPES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int64": "INT64"}
_SHOWN_ERRORS = 3


@dataclass(frozen=True, slots=True)
class Network:
    """A parsed graph.

    Attributes:
        definition: TensorRT's ``INetworkDefinition``.
        parser: which owns the weights, and must live as long.
    """

    definition: Any
    parser: Any


def parse_network(
    library: Library, logger: Any, builder: Any, graph: Path, limits: EngineLimits
) -> Network:
    """Parse a graph whose cache gets the capacity of an engine.

    Args:
        library: what ``builder`` is of.
        logger: what TensorRT writes to.
        builder: what will build the network.
        graph: an ONNX file, its weights beside it. ``graph_file.check_graph`` is for the caller.
        limits: of the engine.

    Raises:
        BackendError: it can't be read, or TensorRT can't parse it.
    """
    trt = library.module
    try:
        data = with_static_axis(graph.read_bytes(), "C", limits.capacity)
    except OSError as error:
        raise BackendError(f"{graph} can't be read: {error.strerror}") from error
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse(data, path=str(graph)):
        raise BackendError(f"{library.name} can't parse {graph}: {_parser_errors(parser)}")
    return Network(definition, parser)


def check_network(
    library: Library, definition: Any, geometry: Geometry, limits: EngineLimits, precision: DType
) -> None:
    """Refuse a network that isn't the one that was meant.

    Args:
        library: what it is of.
        definition: of a ``Network``.
        geometry: the model's.
        limits: what it was parsed for.
        precision: type of the activations, and of keys and values.

    Raises:
        BackendError: something isn't as it must be; the message says what.
    """
    if not definition.get_flag(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED):
        raise _wrong("its types are TensorRT's choice")
    _check_signature(library, definition, geometry, limits, precision)
    layers = [definition.get_layer(i) for i in range(definition.num_layers)]
    _check_attention(library, layers, geometry, limits)
    _check_caches(library, layers, geometry)


def _check_signature(
    library: Library, definition: Any, geometry: Geometry, limits: EngineLimits, precision: DType
) -> None:
    """Names, types and shapes of what goes in and comes out."""
    dialect = TENSORRT.typed(precision)
    inputs = (*dialect.inputs, *dialect.cache_inputs(geometry.num_layers))
    outputs = (dialect.logits, *dialect.cache_outputs(geometry.num_layers))
    sizes = {
        "K": geometry.num_kv_heads,
        "C": limits.capacity,
        "D": geometry.head_dim,
        "V": geometry.vocab_size,
    }
    for specs, tensors in (
        (inputs, [definition.get_input(i) for i in range(definition.num_inputs)]),
        (outputs, [definition.get_output(i) for i in range(definition.num_outputs)]),
    ):
        has = {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in tensors}
        needs = {spec.name: _needed(library, spec, sizes) for spec in specs}
        for name in sorted(has.keys() | needs.keys()):
            if has.get(name) != needs.get(name):
                raise _wrong(
                    f"{name!r:.80} is {_shown(has.get(name))} and must be {_shown(needs.get(name))}"
                )


def _needed(library: Library, spec: TensorSpec, sizes: dict[str, int]) -> tuple[Any, Any]:
    dtype = getattr(library.module.DataType, _TYPES[spec.dtype])
    return dtype, tuple(sizes.get(axis, -1) for axis in spec.axes)


def _check_attention(
    library: Library, layers: list[Any], geometry: Geometry, limits: EngineLimits
) -> None:
    """Every attention is masked by the one mask of the graph, and by nothing else."""
    trt = library.module
    count, masks = 0, set()
    for layer in _of_type(layers, trt.LayerType.ATTENTION_INPUT, trt.IAttentionInputLayer):
        count += 1
        attention, mask = layer.attention, layer.attention.mask
        # The kind came after the flag: TensorRT 10.15 doesn't have it.
        kind = getattr(attention, "causal_kind", None)
        if attention.causal or (kind is not None and kind != trt.CausalMaskKind.NONE):
            raise _wrong(f"the attention {layer.name!r:.80} has a causality of its own")
        if mask is None:
            raise _wrong(f"the attention {layer.name!r:.80} has no mask")
        if mask.dtype != trt.DataType.BOOL or mask.shape[-1] != limits.capacity:
            raise _wrong(
                f"the mask {mask.name!r:.80} is {_shown((mask.dtype, tuple(mask.shape)))} and must "
                f"be BOOL [..., {limits.capacity}]"
            )
        masks.add(mask.name)
    if count != geometry.num_layers:
        raise _wrong(f"it has {count} attention layers and must have {geometry.num_layers}")
    if len(masks) != 1:
        raise _wrong(f"its attention layers use {len(masks)} masks and must share one")


def _check_caches(library: Library, layers: list[Any], geometry: Geometry) -> None:
    """Every cache is updated in place, at the length of each sequence, and nothing else is."""
    trt = library.module
    sources = {
        layer.get_output(i).name: layer
        for layer in layers
        if layer.type == trt.LayerType.CAST
        for i in range(layer.num_outputs)
    }
    updates = {}
    for layer in _of_type(layers, trt.LayerType.KV_CACHE_UPDATE, trt.IKVCacheUpdateLayer):
        cache, place = layer.get_input(0), layer.get_input(2)
        while place.name in sources:  # the parser makes int32 of it
            place = sources[place.name].get_input(0)
        if not place.is_network_input or place.name != "past_lengths":
            raise _wrong(f"the cache update {layer.name!r:.80} writes at {place.name!r:.80}")
        updates[layer.get_output(0).name] = cache.name if cache.is_network_input else None
    pairs = zip(
        TENSORRT.cache_inputs(geometry.num_layers),
        TENSORRT.cache_outputs(geometry.num_layers),
        strict=True,
    )
    expected = {output.name: source.name for source, output in pairs}
    for name in sorted(expected.keys() | updates.keys()):
        if updates.get(name) != expected.get(name):
            raise _wrong(
                f"{name!r:.80} is an update of {updates.get(name)!r:.80} and must be one of "
                f"{expected.get(name)!r:.80}"
            )


def _of_type(layers: list[Any], kind: Any, interface: Any) -> Iterator[Any]:
    """The layers of a type, with all that they have: a network gives them out as plain ones."""
    for layer in layers:
        if layer.type == kind:
            layer.__class__ = interface
            yield layer


def _parser_errors(parser: Any) -> str:
    """The first errors of a parser, each with its operator and its node."""
    shown = []
    for i in range(min(parser.num_errors, _SHOWN_ERRORS)):
        error = parser.get_error(i)
        operator, node = error.node_operator(), error.node_name()
        where = f"at the operator {operator} of the node {node!r:.80}: " if operator else ""
        shown.append(where + one_line(error.desc(), 400))
    return "; ".join(shown) or "it doesn't say why"


def _shown(value: tuple[Any, Any] | None) -> str:
    if value is None:
        return "absent"
    dtype, shape = value
    return f"{dtype.name} [{', '.join('?' if n < 0 else str(n) for n in shape)}]"


def _wrong(problem: str) -> BackendError:
    return BackendError(
        f"TensorRT's network of the graph isn't the one that was meant: {problem}; rebuild the "
        "bundle with llama-export build"
    )
