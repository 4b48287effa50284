"""From a checkpoint to a bundle, in the order the data takes.

The bundle is written into a folder beside the output and renamed when it has passed its checks,
so an output either is a whole, verified bundle or isn't there.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from llama_decoder.attention import eager_attention
from llama_decoder.decoder import build_decoder
from llama_export.chat_fixture import make_fixture
from llama_export.cpu_checks import CpuVerification
from llama_export.device_check import check_on_device, usable_device
from llama_export.errors import ExportError
from llama_export.model_card import model_card
from llama_export.output_folder import new_directory
from llama_export.paged_checks import PagedVerification, num_paged_steps, verify_paged
from llama_export.precision import Precision
from llama_export.precisions import choose_precision, precision_of
from llama_export.quality import make_reference, measure, num_parameters, write_reference
from llama_export.sampler import save_sampler
from llama_export.source_tokenizer import SourceTokenizer
from llama_export.sources import ModelSource, RandomSource, open_source
from llama_export.stages import Stages
from llama_export.trace import save_graph, trace_skeleton
from llama_export.verify import num_compared_tokens, verify
from llama_export.weight_file import (
    read_weights,
    weight_bytes,
    weight_regions,
    write_weights,
)
from llama_runtime import __version__
from llama_runtime.bundle import (
    Bundle,
    Graph,
    Licence,
    Manifest,
    describe_file,
    describe_files,
    open_bundle,
    write_manifest,
)
from llama_runtime.bundle_limits import CHAT_FIXTURE, CHAT_TEMPLATE, REFERENCE_LOGPROBS
from llama_runtime.contract import SAMPLER, SLOTS, TENSORRT
from llama_runtime.errors import BundleError, one_line
from llama_runtime.graph_file import check_graph
from llama_runtime.interrupts import Held
from llama_runtime.prompt_encoder import PromptEncoder

logger = logging.getLogger(__name__)

GRAPH_FILE = "decoder.onnx"
SAMPLER_FILE = "sampler.onnx"
WEIGHT_FILE = "model.safetensors"
MODEL_CARD = "README.md"
TOOLS = ("torch", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")


def build_bundle(
    model: Path | str,
    output: Path,
    *,
    target: str = "cpu",
    precision: str | None = None,
    kv_cache: str = "same",
    block: int | None = None,
    calibrated: bool = True,
    quality: bool | None = None,
    random_seed: int | None = None,
    force: bool = False,
    stages: Stages | None = None,
) -> Manifest:
    """Build a bundle from a checkpoint.

    Args:
        model: a Hugging Face directory or a ``.gguf`` file; with ``random_seed``, the name of a
            published shape.
        output: the bundle's directory; must be absent or empty.
        target: ``cpu``, ``cuda`` or ``tensorrt``: what the graph is for.
        precision: what the weights are stored in: ``fp32``, ``int8`` or ``int4`` for the CPU;
            ``fp16``, ``bf16`` or ``int4`` for CUDA and TensorRT. None is the first of these.
        kv_cache: what keys and values are kept in: ``same``, the type of the activations; ``fp8``,
            for CUDA, in half the memory; or ``int8``, for the CPU, in a quarter.
        block: columns that share a scale where weights have 4 bits on a CPU: 32, 64 or 128. None is
            32.
        calibrated: whether the weights of ``int8`` and ``int4`` for a CPU are rounded as a
            calibration text asks for; else to the nearest: minutes less, and less exact.
        quality: whether the predictions of the evaluation texts are measured, and kept for
            ``llama-run eval``. None does that where weights or cache are rounded for a CPU.
        random_seed: make weights up from this seed, in the shape of ``model``.
        force: replace a bundle that is there. Other files are never removed.
        stages: where progress goes; None is silent.

    Returns:
        What the bundle's manifest says.

    Raises:
        CheckpointError: the checkpoint can't be used.
        ExportError: the output is in the way, precision or cache isn't one of the target's or can't
            hold the model, or the graph doesn't compute what the model does.
    """
    stages = stages or Stages()
    recipe = choose_precision(target, precision, kv_cache, block, calibrated=calibrated)
    if target != "cpu" and quality is not None:
        raise ExportError(f"quality is measured of bundles for the CPU, not for {target}")
    if random_seed is not None and (quality or not calibrated):
        raise ExportError("random weights have no quality, and are always rounded to the nearest")
    check_output(output, force=force)
    source = open_source(model, random_seed)
    recipe = source.adapted(recipe)
    try:
        with new_directory(output) as directory:
            return write_bundle(source, recipe, directory, stages, quality=quality)
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(f"{output} can't be written: {reason}") from error


def verify_bundle(
    path: Path,
    model: Path | str,
    *,
    random_seed: int | None = None,
    stages: Stages | None = None,
) -> CpuVerification | PagedVerification:
    """Check a bundle's files, then its graph against the source, whose weights are read anew.

    A bundle that passes records the figures in its manifest, if they are others than before and it
    can be written; its model card keeps those of the build.

    Args:
        path: the bundle.
        model: the checkpoint that it was built from, or the shape.
        random_seed: the seed of a bundle with random weights.
        stages: where progress goes; None is silent.

    Raises:
        BundleError: a file of the bundle is not what was built.
        CheckpointError: the checkpoint can't be used.
        ExportError: the bundle was built from another checkpoint, its chat template doesn't write
            the prompts that it did, or the structure of its graph is not that of the contract.
    """
    stages = stages or Stages()
    with stages("hash files"):
        bundle = open_bundle(path, verify="full")
    _check_text_side(bundle)
    with stages("hash source"):
        source = open_source(model, random_seed)
        given, built_from = source.record(), bundle.manifest.source
        if given.sha256 != built_from.sha256:
            raise ExportError(
                f"{path} was built from {built_from.file} (sha256 {built_from.sha256}), not from "
                f"{model} (sha256 {given.sha256})"
            )
    run = not isinstance(source, RandomSource)
    result = _verify(bundle, source, source.weights(), stages, run=run)
    figures = {**bundle.manifest.verification, **result.as_dict()}
    if result.passed and figures != bundle.manifest.verification:
        try:
            with Held():  # of one file, so that an interrupt or a full disk leaves a whole bundle
                write_manifest(bundle.path, replace(bundle.manifest, verification=figures))
        except OSError as error:
            logger.warning("%s passed, but its figures can't be recorded: %s", path, error.strerror)
    return result


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that would lose somebody's files.

    Raises:
        ExportError: it is a file, or holds files that ``force`` may not replace.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ExportError(f"{output} is in the way: it is not a directory")
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise ExportError(f"{output} is not empty: choose another --output, or --force to replace")
    try:
        open_bundle(output, verify="size")  # which refuses files that are not the bundle's
    except BundleError as error:
        raise ExportError(
            f"{output} holds no bundle that is whole, so --force will not replace it: {error}"
        ) from error


def write_bundle(
    source: ModelSource,
    precision: Precision,
    directory: Path,
    stages: Stages,
    *,
    quality: bool | None = None,
) -> Manifest:
    """Write a bundle into an empty directory, and check it; see ``build_bundle``."""
    config = source.config
    if quality is None:
        quality = precision.is_rounded and not isinstance(source, RandomSource)
    precision.check(config)
    layout = precision.layout(config)
    with stages("read tokenizer"):
        tokenizer = source.tokenizer()
        _write_texts(directory, tokenizer)
    what = "round weights" if precision.is_rounded else "stream weights"
    with stages(what, weight_bytes(layout)) as advance:
        for written in write_weights(directory / WEIGHT_FILE, layout, source.pieces(precision)):
            advance(written)
    with stages("trace decoder"):
        traced = trace_skeleton(config, precision)
        save_graph(traced, directory / GRAPH_FILE, WEIGHT_FILE, weight_regions(layout))
        save_sampler(config.vocab_size, directory / SAMPLER_FILE)
    if quality:
        with stages("read texts", num_parameters(config)) as advance:
            write_reference(directory, config, source.weights(), advance)
    licence_files = source.licence_files()
    for path in licence_files:
        shutil.copyfile(path, directory / path.name)
    with stages("hash files"):
        manifest = Manifest(
            name=one_line(source.name, 200),
            created_by=_tool_versions(),
            source=source.record(),
            licence=Licence(source.licence, tuple(path.name for path in licence_files)),
            geometry=config.geometry,
            graphs=(
                Graph(dialect=precision.dialect.name, precision=precision.name, file=GRAPH_FILE),
                Graph(dialect=SAMPLER, precision="fp32", file=SAMPLER_FILE),
            ),
            special_tokens=tokenizer.special_tokens,
            verification={},
            files=describe_files(directory),
        )
        write_manifest(directory, manifest)
    bundle = open_bundle(directory, verify="size")
    _check_text_side(bundle)
    # Random weights are for measuring: to run them would take longest. What is rounded runs where
    # its quality is measured.
    run = not isinstance(source, RandomSource) and (quality or not precision.is_rounded)
    result = _verify(bundle, source, read_weights(directory / WEIGHT_FILE), stages, run=run)
    if isinstance(result, CpuVerification):
        result = replace(result, finer=precision.finer)
    result.require_passed()
    return _record(directory, manifest, {**result.as_dict(), **_recipe(precision)})


def _verify(
    bundle: Bundle,
    source: ModelSource,
    weights: Iterable[tuple[str, np.ndarray | torch.Tensor]],
    stages: Stages,
    *,
    run: bool = True,
) -> CpuVerification | PagedVerification:
    """Check a bundle's graph against its source, as far as this host can.

    Args:
        bundle: its files have been checked.
        source: what it was built from.
        weights: for a graph that can be run here, the parameters to run the decoder with.
        stages: where progress goes.
        run: whether a graph that is paged or rounded is run, if it can be here.
    """
    graph = next(graph for graph in bundle.manifest.graphs if graph.dialect != SAMPLER)
    precision = precision_of(graph.dialect, graph.precision)
    if graph.dialect != SLOTS.name:
        with stages("check weights", num_paged_steps(source)) as advance:
            checked = verify_paged(bundle, source, precision, bundle.path / WEIGHT_FILE, advance)
        if graph.dialect == TENSORRT.name:
            stages.note("no engine has run: scripts/check_gpu --tensorrt does on a host with a GPU")
            return checked
        device = usable_device() if run else None
        if device is None:
            stages.note("the graph has not been run: llama-export verify does on a host with CUDA")
            return checked
        with stages("run on the GPU"):
            found = check_on_device(bundle, source.config, precision, device)
            return replace(checked, device=found)
    compared = report = None
    if not precision.is_rounded:
        with stages("load source"):
            decoder = build_decoder(source.config, weights, eager_attention)
        with stages("verify", num_compared_tokens()) as advance:
            compared = verify(bundle, decoder, advance)
    elif not run:
        check_graph(bundle.graph_path(graph.dialect))
        return CpuVerification(None, None)
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


def _check_text_side(bundle: Bundle) -> None:
    """Open tokenizer and chat template as the runtime will.

    Raises:
        ExportError: it would refuse them.
    """
    try:
        _ = PromptEncoder(bundle).tokenizer.byte_table
    except BundleError as error:
        raise ExportError(f"the runtime can't use what was built: {error}") from error


def _recipe(precision: Precision) -> dict[str, object]:
    return {"recipe": precision.recipe} if precision.recipe else {}


def _record(directory: Path, manifest: Manifest, figures: dict[str, object]) -> Manifest:
    """Write the figures into the model card and the manifest."""
    manifest = replace(manifest, verification=figures)
    card = directory / MODEL_CARD
    card.write_text(model_card(manifest), encoding="utf-8")
    manifest = replace(manifest, files={**manifest.files, MODEL_CARD: describe_file(card)})
    write_manifest(directory, manifest)
    return manifest


def _write_texts(directory: Path, tokenizer: SourceTokenizer) -> None:
    (directory / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    config = json.dumps(tokenizer.generation_config, indent=2) + "\n"
    (directory / "generation_config.json").write_text(config, encoding="utf-8")
    if tokenizer.chat_template is not None:
        path = directory / CHAT_TEMPLATE
        path.write_text(tokenizer.chat_template, encoding="utf-8", newline="")
        fixture = make_fixture(tokenizer.chat_template, tokenizer.special_tokens)
        (directory / CHAT_FIXTURE).write_text(fixture.to_json(), encoding="utf-8", newline="")


def _tool_versions() -> dict[str, str]:
    versions = {}
    for name in TOOLS:
        with suppress(importlib.metadata.PackageNotFoundError):  # of onnxruntime there is either
            versions[name] = importlib.metadata.version(name)
    return {"llama-caravan": __version__, "python": platform.python_version(), **versions}
