"""From a checkpoint to a bundle, in the order the data takes.

The bundle is written into a folder beside the output and renamed when it has passed its checks,
so an output either is a whole, verified bundle or isn't there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

from llama_decoder.attention import eager_attention, slots_attention
from llama_decoder.checkpoint import Checkpoint, open_checkpoint
from llama_decoder.decoder import build_decoder, rope_buffers
from llama_decoder.weights import parameter_shapes
from llama_export.errors import ExportError
from llama_export.gguf_tokenizer import read_gguf_tokenizer
from llama_export.model_card import model_card
from llama_export.output_folder import new_directory
from llama_export.sampler import save_sampler
from llama_export.source_tokenizer import SourceTokenizer, read_huggingface_tokenizer
from llama_export.stages import Stages
from llama_export.trace import save_graph, trace_decoder
from llama_export.verify import Verification, num_compared_tokens, verify
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
    Source,
    describe_file,
    describe_files,
    open_bundle,
    write_manifest,
)
from llama_runtime.bundle_limits import CHAT_TEMPLATE
from llama_runtime.contract import SAMPLER, SLOTS
from llama_runtime.errors import BundleError, one_line
from llama_runtime.generation_config import default_params, eos_token_ids
from llama_runtime.interrupts import Held
from llama_runtime.prompt_encoder import PromptEncoder

logger = logging.getLogger(__name__)

GRAPH_FILE = "decoder.onnx"
SAMPLER_FILE = "sampler.onnx"
WEIGHT_FILE = "model.safetensors"
MODEL_CARD = "README.md"
TOOLS = ("torch", "onnx", "onnxruntime", "numpy", "tokenizers")


def build_bundle(
    model: Path, output: Path, *, force: bool = False, stages: Stages | None = None
) -> Manifest:
    """Build a bundle from a checkpoint.

    Args:
        model: a Hugging Face directory or a ``.gguf`` file.
        output: the bundle's directory; must be absent or empty.
        force: replace a bundle that is there. Other files are never removed.
        stages: where progress goes; None is silent.

    Returns:
        What the bundle's manifest says.

    Raises:
        CheckpointError: the checkpoint can't be used.
        ExportError: the output is in the way, or the graph doesn't compute what the model does.
    """
    stages = stages or Stages()
    check_output(output, force=force)
    checkpoint = open_checkpoint(model)
    try:
        with new_directory(output) as directory:
            return _write_bundle(checkpoint, directory, stages)
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(f"{output} can't be written: {reason}") from error


def verify_bundle(path: Path, model: Path, *, stages: Stages | None = None) -> Verification:
    """Check a bundle's files, then its graph against the source, whose weights are read anew.

    A bundle that passes records the figures in its manifest, if they are others than before and it
    can be written; its model card keeps those of the build.

    Args:
        path: the bundle.
        model: the checkpoint that it was built from.
        stages: where progress goes; None is silent.

    Raises:
        BundleError: a file of the bundle is not what was built.
        CheckpointError: the checkpoint can't be used.
        ExportError: the bundle was built from another checkpoint.
    """
    stages = stages or Stages()
    with stages("hash files"):
        bundle = open_bundle(path, verify="full")
    with stages("hash source"):
        checkpoint = open_checkpoint(model)
        source, built_from = _source(checkpoint), bundle.manifest.source
        if source.sha256 != built_from.sha256:
            raise ExportError(
                f"{path} was built from {built_from.file} (sha256 {built_from.sha256}), not from "
                f"{model} (sha256 {source.sha256})"
            )
    with stages("load source"):
        decoder = build_decoder(checkpoint.config, checkpoint.weights(), eager_attention)
    with stages("verify", num_compared_tokens()) as advance:
        result = verify(bundle, decoder, advance)
    figures = result.as_dict()
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


def read_tokenizer(checkpoint: Checkpoint) -> SourceTokenizer:
    """The checkpoint's tokenizer, whatever its format.

    Raises:
        ExportError: it, or what the model publishes on generation, can't be used.
        CheckpointError: a GGUF file's metadata can't.
    """
    if checkpoint.source_format == "gguf":
        tokenizer = read_gguf_tokenizer(checkpoint.metadata)
    else:
        tokenizer = read_huggingface_tokenizer(checkpoint.path)
    config = tokenizer.generation_config
    try:
        json.dumps(config, allow_nan=False)
        default_params(config)
        eos_token_ids(config)
    except (ValueError, BundleError) as error:  # the runtime would refuse it in the bundle
        raise ExportError(f"{checkpoint.path} can't be used: {error}") from error
    return tokenizer


def _write_bundle(checkpoint: Checkpoint, directory: Path, stages: Stages) -> Manifest:
    config = checkpoint.config
    weights = directory / WEIGHT_FILE
    with stages("read tokenizer"):
        tokenizer = read_tokenizer(checkpoint)
        _write_texts(directory, tokenizer)
    tables = [(name, table.numpy()) for name, table in rope_buffers(config)]
    shapes = parameter_shapes(config) | {name: table.shape for name, table in tables}
    with stages("stream weights", weight_bytes(shapes)) as advance:
        for written in write_weights(weights, shapes, chain(checkpoint.weights(), tables)):
            advance(written)
    with stages("trace decoder"):
        traced = trace_decoder(build_decoder(config, read_weights(weights), slots_attention), SLOTS)
        save_graph(traced, directory / GRAPH_FILE, WEIGHT_FILE, weight_regions(shapes))
        save_sampler(config.vocab_size, directory / SAMPLER_FILE)
    licence_files = checkpoint.licence_files()
    for path in licence_files:
        shutil.copyfile(path, directory / path.name)
    with stages("hash files"):
        manifest = Manifest(
            name=one_line(checkpoint.name, 200),
            created_by=_tool_versions(),
            source=_source(checkpoint),
            licence=Licence(checkpoint.licence, tuple(path.name for path in licence_files)),
            geometry=config.geometry,
            graphs=(
                Graph(dialect=SLOTS.name, precision="fp32", file=GRAPH_FILE),
                Graph(dialect=SAMPLER, precision="fp32", file=SAMPLER_FILE),
            ),
            special_tokens=tokenizer.special_tokens,
            verification={},
            files=describe_files(directory),
        )
        write_manifest(directory, manifest)
    with stages("verify", num_compared_tokens()) as advance:
        decoder = build_decoder(config, read_weights(weights), eager_attention)
        bundle = open_bundle(directory, verify="size")
        _check_text_side(bundle)
        result = verify(bundle, decoder, advance)
        result.require_passed()
    return _record(directory, manifest, result)


def _check_text_side(bundle: Bundle) -> None:
    """Open tokenizer and chat template as the runtime will.

    Raises:
        ExportError: it would refuse them.
    """
    try:
        _ = PromptEncoder(bundle).tokenizer.byte_table
    except BundleError as error:
        raise ExportError(f"the runtime can't use what was built: {error}") from error


def _record(directory: Path, manifest: Manifest, result: Verification) -> Manifest:
    """Write the figures into the model card and the manifest."""
    manifest = replace(manifest, verification=result.as_dict())
    card = directory / MODEL_CARD
    card.write_text(model_card(manifest), encoding="utf-8")
    manifest = replace(manifest, files={**manifest.files, MODEL_CARD: describe_file(card)})
    write_manifest(directory, manifest)
    return manifest


def _source(checkpoint: Checkpoint) -> Source:
    """Name and hash of the checkpoint; of several files, the hash of what sha256sum prints."""
    digests = checkpoint.sha256()
    if len(digests) == 1:
        (digest,) = digests.values()
    else:
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        digest = hashlib.sha256(lines.encode()).hexdigest()
    name = one_line(checkpoint.path.resolve().name)
    return Source(format=checkpoint.source_format, file=name, sha256=digest)


def _write_texts(directory: Path, tokenizer: SourceTokenizer) -> None:
    (directory / "tokenizer.json").write_bytes(tokenizer.tokenizer_json)
    config = json.dumps(tokenizer.generation_config, indent=2) + "\n"
    (directory / "generation_config.json").write_text(config, encoding="utf-8")
    if tokenizer.chat_template is not None:
        path = directory / CHAT_TEMPLATE
        path.write_text(tokenizer.chat_template, encoding="utf-8", newline="")


def _tool_versions() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in TOOLS}
    return {"llama-caravan": __version__, "python": platform.python_version(), **versions}
