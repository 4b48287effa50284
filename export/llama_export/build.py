"""From a checkpoint to a bundle, in the order the data takes.

The bundle is written into a folder beside the output and renamed when it has passed its checks,
so an output either is a whole, verified bundle or isn't there.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from llama_export.bundle_checks import check_bundle, check_text_side
from llama_export.chat_fixture import make_fixture
from llama_export.cpu_checks import CpuVerification
from llama_export.errors import ExportError
from llama_export.model_card import model_card
from llama_export.output_folder import new_directory
from llama_export.precision import Precision
from llama_export.precisions import choose_precision
from llama_export.quality import num_parameters, write_reference
from llama_export.sampler import save_sampler
from llama_export.source_tokenizer import SourceTokenizer
from llama_export.sources import ModelSource, RandomSource, open_source
from llama_export.stages import Stages
from llama_export.trace import save_graph, trace_skeleton
from llama_export.weight_file import (
    WEIGHT_FILE,
    read_weights,
    weight_bytes,
    weight_regions,
    write_weights,
)
from llama_runtime import __version__
from llama_runtime.bundle import (
    Graph,
    Licence,
    Manifest,
    describe_file,
    describe_files,
    open_bundle,
    write_manifest,
)
from llama_runtime.bundle_limits import CHAT_FIXTURE, CHAT_TEMPLATE
from llama_runtime.contract import SAMPLER
from llama_runtime.errors import BundleError, one_line

GRAPH_FILE = "decoder.onnx"
SAMPLER_FILE = "sampler.onnx"
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
    for path in source.licence_files():
        shutil.copyfile(path, directory / path.name)
    with stages("hash files"):
        manifest = _manifest(source, precision, tokenizer, directory)
        write_manifest(directory, manifest)
    bundle = open_bundle(directory, verify="size")
    check_text_side(bundle)
    # Random weights are for measuring: to run them would take longest. What is rounded runs where
    # its quality is measured.
    run = not isinstance(source, RandomSource) and (quality or not precision.is_rounded)
    result = check_bundle(bundle, source, read_weights(directory / WEIGHT_FILE), stages, run=run)
    if isinstance(result, CpuVerification):
        result = replace(result, finer=precision.finer)
    result.require_passed()
    return _record(directory, manifest, {**result.as_dict(), **_recipe(precision)})


def _manifest(
    source: ModelSource, precision: Precision, tokenizer: SourceTokenizer, directory: Path
) -> Manifest:
    """What a bundle whose files are written says about itself before it is checked."""
    return Manifest(
        name=one_line(source.name, 200),
        created_by=_tool_versions(),
        source=source.record(),
        licence=Licence(source.licence, tuple(path.name for path in source.licence_files())),
        geometry=source.config.geometry,
        graphs=(
            Graph(dialect=precision.dialect.name, precision=precision.name, file=GRAPH_FILE),
            Graph(dialect=SAMPLER, precision="fp32", file=SAMPLER_FILE),
        ),
        special_tokens=tokenizer.special_tokens,
        verification={},
        files=describe_files(directory),
    )


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
