"""Is a bundle what it says? Its files, its text side, and its graph against its source.

A build asks before the bundle takes its place, and ``llama-export verify`` whenever somebody wants
to know.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from llama_decoder.attention import eager_attention
from llama_decoder.decoder import build_decoder
from llama_export.cpu_checks import CpuVerification
from llama_export.device_check import check_on_device, usable_device
from llama_export.errors import ExportError
from llama_export.gpu_checks import GpuVerification, num_unrun_steps, verify_unrun
from llama_export.precision import Precision
from llama_export.precisions import precision_of
from llama_export.quality import make_reference, measure, num_parameters
from llama_export.sources import ModelSource, RandomSource, open_source
from llama_export.stages import Stages
from llama_export.verify import num_compared_tokens, verify
from llama_export.weight_file import WEIGHT_FILE
from llama_runtime.bundle import Bundle, open_bundle, write_manifest
from llama_runtime.bundle_limits import REFERENCE_LOGPROBS
from llama_runtime.contract import SAMPLER, SLOTS
from llama_runtime.errors import BundleError
from llama_runtime.graph_file import check_graph
from llama_runtime.interrupts import Held
from llama_runtime.prompt_encoder import PromptEncoder

logger = logging.getLogger(__name__)

Weights = Iterable[tuple[str, np.ndarray | torch.Tensor]]


def verify_bundle(
    path: Path,
    model: Path | str,
    *,
    random_seed: int | None = None,
    stages: Stages | None = None,
) -> CpuVerification | GpuVerification:
    """Check a bundle's files, then its graph against the source, whose weights are read anew.

    A bundle that passes records the figures in its manifest, if they are others than before and it
    can be written; its model card keeps those of the build.

    Args:
        path: the bundle.
        model: the checkpoint that it was built from, or the shape.
        random_seed: the seed of a bundle with random weights.
        stages: where progress goes; None is silent.

    Returns:
        What was found; whether it ``passed`` is for the caller to look at.

    Raises:
        BundleError: a file of the bundle is not what was built.
        CheckpointError: the checkpoint can't be used.
        ExportError: the bundle was built from another checkpoint, its chat template doesn't write
            the prompts that it did, or the structure of its graph is not that of the contract.
        BackendError: the graph doesn't load or run.
    """
    stages = stages or Stages()
    with stages("hash files"):
        bundle = open_bundle(path, verify="full")
    check_text_side(bundle)
    with stages("hash source"):
        source = open_source(model, random_seed)
        given, built_from = source.record(), bundle.manifest.source
        if given.sha256 != built_from.sha256:
            raise ExportError(
                f"{path} was built from {built_from.file} (sha256 {built_from.sha256}), not from "
                f"{model} (sha256 {given.sha256})"
            )
    run = not isinstance(source, RandomSource)
    result = check_bundle(bundle, source, source.weights(), stages, run=run)
    figures = {**bundle.manifest.verification, **result.as_dict()}
    if result.passed and figures != bundle.manifest.verification:
        try:
            with Held():  # of one file, so that an interrupt or a full disk leaves a whole bundle
                write_manifest(bundle.path, replace(bundle.manifest, verification=figures))
        except OSError as error:
            logger.warning("%s passed, but its figures can't be recorded: %s", path, error.strerror)
    return result


def check_bundle(
    bundle: Bundle, source: ModelSource, weights: Weights, stages: Stages, *, run: bool = True
) -> CpuVerification | GpuVerification:
    """Check a bundle's graph against its source, as far as this host can.

    Args:
        bundle: its files have been checked.
        source: what it was built from.
        weights: for a graph in float32, the parameters to run the decoder with.
        stages: where progress goes.
        run: whether a graph that is for CUDA or rounded is run, if it can be here.

    Raises:
        ExportError: the structure of a graph for a GPU is not that of the contract, or another
            version has built it.
        BackendError: the graph doesn't load or run.
    """
    graph = next((graph for graph in bundle.manifest.graphs if graph.dialect != SAMPLER), None)
    if graph is None:
        raise ExportError(f"{bundle.path} has no graph of a decoder: build it again")
    precision = precision_of(graph.dialect, graph.precision)
    if graph.dialect != SLOTS.name:
        return _check_for_gpu(bundle, source, precision, stages, run=run)
    if precision.is_rounded and not run:
        check_graph(bundle.graph_path(graph.dialect))
        return CpuVerification(None, None)
    return _check_for_cpu(bundle, source, precision, weights, stages)


def _check_for_gpu(
    bundle: Bundle, source: ModelSource, precision: Precision, stages: Stages, *, run: bool
) -> GpuVerification:
    with stages("check weights", num_unrun_steps(source)) as advance:
        checked = verify_unrun(bundle, source, precision, bundle.path / WEIGHT_FILE, advance)
    if precision.target == "tensorrt":
        stages.note("no engine has run: scripts/check_gpu --tensorrt does on a host with a GPU")
        return checked
    device = usable_device() if run else None
    if device is None:
        stages.note("the graph has not been run: llama-export verify does on a host with CUDA")
        return checked
    with stages("run on the GPU"):
        found = check_on_device(bundle, source.config, precision, device)
        return replace(checked, device=found)


def _check_for_cpu(
    bundle: Bundle, source: ModelSource, precision: Precision, weights: Weights, stages: Stages
) -> CpuVerification:
    compared = report = None
    if not precision.is_rounded:
        with stages("load source"):
            decoder = build_decoder(source.config, weights, eager_attention)
        with stages("verify", num_compared_tokens()) as advance:
            compared = verify(bundle, decoder, advance)
    if REFERENCE_LOGPROBS in bundle.manifest.files:
        with stages("measure quality", 100) as advance:
            report = measure(bundle, advance)
    elif precision.is_rounded:
        with stages("read texts", num_parameters(source.config)) as advance:
            reference = make_reference(
                bundle.tokenizer_path, source.config, source.weights(), advance
            )
        with stages("measure quality", 100) as advance:
            report = measure(bundle, advance, reference)
    return CpuVerification(compared, report)


def check_text_side(bundle: Bundle) -> None:
    """Open tokenizer and chat template as the runtime will.

    Raises:
        ExportError: it would refuse them.
    """
    try:
        _ = PromptEncoder(bundle).tokenizer.byte_table
    except BundleError as error:
        raise ExportError(f"the runtime can't use what was built: {error}") from error
