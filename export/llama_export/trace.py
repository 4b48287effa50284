"""Trace the decoder into an ONNX graph whose weights lie in another file.

The names, types and axes are those of the contract. The decoder that is traced is a skeleton, whose
parameters are memory that nobody touches; afterwards each initializer becomes an entry that points
at the tensor of the same name in the bundle's weight file, so no weight is read or copied.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from llama_decoder.attention import (
    Attention,
    paged_attention,
    slots_attention,
    tensorrt_attention,
    tensorrt_places,
)
from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import LlamaDecoder, Prepare
from llama_export.block_passes import quantise_blocks
from llama_export.cache_passes import KV_SCALE, quantise_slots_cache
from llama_export.errors import ExportError
from llama_export.graph_edits import CONSTANT, STORED_AS
from llama_export.host_weights import BlockWeights, Int8Weights
from llama_export.passes import PASSES, fuse_skip_norms, passes_of
from llama_export.precision import Precision
from llama_export.row_passes import quantise_rows
from llama_export.weight_file import Region, Tag
from llama_runtime.contract import SLOTS, Dialect

OPSET = 23  # the first with RMSNormalization, which ONNX Runtime runs as one kernel
OPSETS = {"tensorrt": 24}  # the first with TensorScatter
# Sizes of the example step. All differ and none is 0 or 1: torch.export takes equal sizes for one
# axis and small ones for constants.
EXAMPLE = {"N": 12, "R": 4, "B": 3, "B+1": 6, "S": 5, "C": 40, "M": 10, "G": 16, "P": 7}

ATTENTIONS: dict[str, tuple[Attention, Prepare | None]] = {
    "slots": (slots_attention, None),
    "paged": (paged_attention, None),
    "tensorrt": (tensorrt_attention, tensorrt_places),
}
IR_TYPES: dict[Tag, ir.DataType] = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "U8": ir.DataType.UINT8,
    "I8": ir.DataType.INT8,
}
# The exporter takes initializers of no more elements, if they are equal, for one.
_COMPARED_ELEMENTS = 1024
_MAX_OWN_BYTES = 1 << 16  # of a tensor that the exporter made itself


def trace_skeleton(config: LlamaConfig, precision: Precision) -> ir.Model:
    """The graph of a bundle, traced without any weights."""
    dialect = precision.dialect
    attention, prepare = ATTENTIONS[dialect.name]
    decoder = skeleton(config, attention, getattr(torch, precision.activations), prepare)
    model = trace_decoder(decoder, dialect.typed(precision.activations))
    for change in passes_of(precision):
        change(model)
    weights = precision.host_weights(config)
    if isinstance(weights, Int8Weights):
        quantise_rows(model, weights)
    elif isinstance(weights, BlockWeights):
        quantise_blocks(model, weights)
        fuse_skip_norms(model)
    if dialect.name == SLOTS.name and precision.cache is not None:
        quantise_slots_cache(model)
    return model


def skeleton(
    config: LlamaConfig,
    attention: Attention,
    dtype: torch.dtype,
    prepare: Prepare | None = None,
) -> LlamaDecoder:
    """A decoder for tracing: its parameters have a type and a shape, and values that mean nothing.

    The system gives memory to pages that are touched, and these aren't; so one of any size is made
    at once. Tensors on torch's meta device would do but for the small ones, which the exporter
    compares: those get the bits of a number of their own.

    Args:
        config: the model's numbers.
        attention: the dialect.
        dtype: of every parameter and of the RoPE tables.
        prepare: the dialect's too.
    """
    with torch.device("meta"):
        decoder = LlamaDecoder(config, attention, prepare).to(dtype)
    state = {}
    for number, (name, tensor) in enumerate(decoder.state_dict().items(), start=1):
        state[name] = torch.empty(tensor.shape, dtype=dtype)
        if tensor.numel() <= _COMPARED_ELEMENTS:
            bits = torch.int16 if dtype.itemsize == 2 else torch.int32
            state[name].view(bits).fill_(number)
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.requires_grad_(False).eval()


def trace_decoder(decoder: LlamaDecoder, dialect: Dialect) -> ir.Model:
    """The decoder as an ONNX model with the dialect's inputs and outputs.

    Args:
        decoder: built with the dialect's attention.
        dialect: names, types and axes.
    """
    config = decoder.config
    sizes = EXAMPLE | {"K": config.num_kv_heads, "D": config.head_dim, "3": 3}
    axes = dict.fromkeys(EXAMPLE, torch.export.Dim.DYNAMIC)
    step = dialect.inputs
    cache = dialect.cache_inputs(config.num_layers)

    def example(axes_of: tuple[str, ...], dtype: str) -> torch.Tensor:
        return torch.zeros([sizes[a] for a in axes_of], dtype=getattr(torch, dtype))

    def dynamic(axes_of: tuple[str, ...]) -> dict[int, Any]:
        return {i: axes[a] for i, a in enumerate(axes_of) if a in axes}

    def pairs(flat: list[Any]) -> list[tuple[Any, Any]]:
        return list(zip(flat[::2], flat[1::2], strict=True))

    with _quiet_exporter():
        program = torch.onnx.export(
            decoder,
            args=(
                *(example(spec.axes, spec.dtype) for spec in step[:2]),
                [example(spec.axes, spec.dtype) for spec in step[2:]],
                pairs([example(spec.axes, spec.dtype) for spec in cache]),
            ),
            dynamic_shapes=(
                *(dynamic(spec.axes) for spec in step[:2]),
                [dynamic(spec.axes) for spec in step[2:]],
                pairs([dynamic(spec.axes) for spec in cache]),
            ),
            input_names=[spec.name for spec in (*step, *cache)],
            output_names=[
                spec.name for spec in (dialect.logits, *dialect.cache_outputs(config.num_layers))
            ],
            opset_version=OPSETS.get(dialect.name, OPSET),
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    model = program.model
    _name_axes(model, dialect, config.num_layers)
    for change in PASSES[dialect.name]:
        change(model)
    return model


def save_graph(
    model: ir.Model, path: Path, weight_file: str, regions: Mapping[str, Region]
) -> None:
    """Save the graph with its weights as references into ``weight_file`` beside it.

    Small whole numbers that the exporter made itself, such as shapes, stay inside the graph, and
    the scale of an 8-bit cache, which is 1.

    Raises:
        ExportError: a tensor of the weight file is not an initializer of the graph, or another type
            or shape; or the graph holds numbers of its own that the file doesn't, which the
            exporter may have computed from parameters that mean nothing.
    """
    initializers = model.graph.initializers
    used = {value.meta.get(STORED_AS, name) for name, value in initializers.items()}
    unused = sorted(set(regions) - used)
    if unused:
        raise ExportError(f"the traced graph lost the weights {', '.join(unused[:5])}")
    for name, value in initializers.items():
        tensor = value.const_value
        region = regions.get(value.meta.get(STORED_AS, name))
        if tensor is None:
            continue
        if region is not None:
            shared = STORED_AS in value.meta
            place = path.parent / weight_file
            value.const_value = _reference(tensor, region, name, place, shared=shared)
        elif CONSTANT in value.meta or (name == KV_SCALE and _is_one(tensor)):
            continue
        elif tensor.dtype.is_floating_point() or tensor.nbytes > _MAX_OWN_BYTES:
            raise ExportError(f"the traced graph holds a constant of its own: {name}")
    ir.save(model, path)


def _is_one(tensor: ir.TensorProtocol) -> bool:
    """Whether it is float32 [1], and that is 1."""
    one = np.ones(1, np.float32)
    return (tensor.dtype, tuple(tensor.shape)) == (ir.DataType.FLOAT, (1,)) and bool(
        np.array_equal(tensor.numpy(), one)
    )


def _reference(
    tensor: ir.TensorProtocol, region: Region, name: str, weight_file: Path, *, shared: bool
) -> ir.ExternalTensor:
    """An initializer as a place in the weight file; one that shares it may have another shape."""
    stored, shape = region.stored, tuple(tensor.shape)
    if tensor.dtype == ir.DataType.INT4:  # two in a byte, and the file has bytes by blocks
        fits = stored.tag == "U8" and tensor.nbytes == region.length
    elif shared:
        fits = tensor.dtype == IR_TYPES[stored.tag] and tensor.nbytes == region.length
    else:
        fits = (tensor.dtype, shape) == (IR_TYPES[stored.tag], stored.shape)
    if not fits:
        raise ExportError(
            f"the traced graph has {name} as {tensor.dtype} {shape}, the weight file "
            f"as {stored.tag} {stored.shape}"
        )
    return ir.ExternalTensor(
        weight_file.name,
        region.offset,
        region.length,
        dtype=tensor.dtype,
        shape=tensor.shape,
        name=name,
        base_dir=weight_file.parent,
    )


def _name_axes(model: ir.Model, dialect: Dialect, num_layers: int) -> None:
    """Call the dynamic axes by the contract's letters, in place of torch's s0, s1, ..."""
    specs = (
        *dialect.inputs,
        *dialect.cache_inputs(num_layers),
        dialect.logits,
        *dialect.cache_outputs(num_layers),
    )
    for value, spec in zip((*model.graph.inputs, *model.graph.outputs), specs, strict=True):
        if value.name != spec.name:
            raise ExportError(f"the traced graph has {value.name} where {spec.name} belongs")
        value.shape = ir.Shape(
            [
                axis if axis in EXAMPLE else size
                for axis, size in zip(spec.axes, value.shape or (), strict=True)
            ]
        )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's progress lines and notes about itself out of the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
