"""Trace the decoder into an ONNX graph whose weights lie in another file.

The names, types and axes are those of the contract. The decoder that is traced holds
memory-mapped parameters, which tracing doesn't read; afterwards each initializer becomes an entry
that points at the tensor of the same name in the bundle's weight file, so nothing is copied.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from llama_decoder.decoder import LlamaDecoder
from llama_export.errors import ExportError
from llama_export.passes import fold_residuals, separate_factors
from llama_export.weight_file import Region
from llama_runtime.contract import LOGITS, Dialect

OPSET = 23  # the first with RMSNormalization, which ONNX Runtime runs as one kernel
# Sizes of the example step. All differ and none is 0 or 1: torch.export takes equal sizes for one
# axis and small ones for constants.
EXAMPLE = {"N": 12, "R": 4, "B": 3, "S": 5, "C": 40}


def trace_decoder(decoder: LlamaDecoder, dialect: Dialect) -> ir.Model:
    """The decoder as an ONNX model with the dialect's inputs and outputs.

    Args:
        decoder: built with the dialect's attention.
        dialect: names, types and axes.
    """
    config = decoder.config
    sizes = EXAMPLE | {"K": config.num_kv_heads, "D": config.head_dim}
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
                *(example(spec.axes, spec.dtype) for spec in step),
                pairs([example(spec.axes, spec.dtype) for spec in cache]),
            ),
            dynamic_shapes=(
                *(dynamic(spec.axes) for spec in step),
                pairs([dynamic(spec.axes) for spec in cache]),
            ),
            input_names=[spec.name for spec in (*step, *cache)],
            output_names=[
                spec.name for spec in (LOGITS, *dialect.cache_outputs(config.num_layers))
            ],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise ExportError("torch.onnx.export returned no program")
    model = program.model
    _name_axes(model, dialect, config.num_layers)
    fold_residuals(model)
    return model


def save_graph(
    model: ir.Model, path: Path, weight_file: str, regions: Mapping[str, Region]
) -> None:
    """Save the graph with its weights as references into ``weight_file`` beside it.

    Small constants that the exporter made itself stay inside the graph.

    Raises:
        ExportError: a tensor of the weight file is not an initializer of the graph, or the graph
            holds a large one that the file doesn't.
    """
    initializers = model.graph.initializers
    unused = sorted(set(regions) - set(initializers))
    if unused:
        raise ExportError(f"the traced graph lost the weights {', '.join(unused[:5])}")
    twins = separate_factors(model)
    regions = {**regions, **{twin: regions[name] for twin, name in twins.items()}}
    for name, value in initializers.items():
        tensor = value.const_value
        region = regions.get(name)
        if region is not None and tensor is not None:
            value.const_value = ir.ExternalTensor(
                weight_file,
                region.offset,
                region.length,
                dtype=tensor.dtype,
                shape=tensor.shape,
                name=name,
                base_dir=path.parent,
            )
        elif tensor is not None and tensor.nbytes > 1 << 16:
            raise ExportError(f"the traced graph holds a large constant of its own: {name}")
    ir.save(model, path)


def _name_axes(model: ir.Model, dialect: Dialect, num_layers: int) -> None:
    """Call the dynamic axes by the contract's letters, in place of torch's s0, s1, ..."""
    specs = (
        *dialect.inputs,
        *dialect.cache_inputs(num_layers),
        LOGITS,
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
