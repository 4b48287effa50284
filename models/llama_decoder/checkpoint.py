"""Opens a checkpoint: a Hugging Face directory of safetensors, or a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from llama_decoder import licence
from llama_decoder.config import LlamaConfig
from llama_decoder.errors import CheckpointError
from llama_decoder.gguf_blocks import Blocks, BlockType, stacked
from llama_decoder.gguf_file import OUTPUT, ROPE_FACTORS, GgufWeights
from llama_decoder.names import EMBEDDING, HEAD
from llama_decoder.safetensors_file import CONFIG, SafetensorsWeights
from llama_decoder.source_files import NEEDS_SAFETENSORS, PICKLES, read_json
from llama_decoder.weights import (
    Array,
    Parameter,
    SourceFormat,
    TensorSource,
    check_tensors,
    parameters,
    separate,
    stream,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose configuration and tensors have been checked; no value is read yet.

    Attributes:
        path: as it was given: a directory, or a ``.gguf`` file.
        name: the model's name, for people.
        config: the model's numbers.
        source_format: what holds the weights.
        metadata: a GGUF file's metadata as plain Python values; empty for a directory.
        licence: the licence's name, if the checkpoint states it.
        files: what configuration and weights are read from.
    """

    path: Path
    name: str
    config: LlamaConfig
    source_format: SourceFormat
    metadata: Mapping[str, object] = field(repr=False)
    licence: str | None
    files: tuple[Path, ...]
    _parameters: list[Parameter] = field(repr=False)
    _source: TensorSource = field(repr=False)

    def weights(self) -> Iterator[tuple[str, Array]]:
        """Every parameter's name and float32 value, in the decoder's order.

        One at a time is in memory. The arrays are writable, and private maps of the file where
        values are stored as float32.
        """
        return stream(self._parameters, self._source)

    def weight(self, name: str) -> Array:
        """One parameter in float32."""
        return next(stream([self._parameter(name)], self._source))[1]

    def block_types(self) -> dict[str, BlockType | None]:
        """In which blocks the file holds each matrix; None if it is in none."""
        return {
            parameter.name: self._block_type(parameter)
            for parameter in self._parameters
            if len(parameter.shape) > 1
        }

    def _block_type(self, parameter: Parameter) -> BlockType | None:
        if not isinstance(self._source, GgufWeights):
            return None
        (found, *others) = {self._source.block_type(part.name) for part in parameter.parts}
        return None if others else found

    def blocks(self, name: str) -> Blocks:
        """The whole numbers of a matrix, if ``block_types`` says that it has some.

        Raises:
            CheckpointError: it has none.
        """
        parameter = self._parameter(name)
        if not isinstance(self._source, GgufWeights) or self._block_type(parameter) is None:
            raise CheckpointError(f"{self.path} doesn't hold {name} in blocks of whole numbers")
        parts = []
        for part in parameter.parts:
            blocks, heads = self._source.blocks(part.name), part.interleaved_heads
            if heads:  # of which only rows change places
                blocks = blocks.with_rows(partial(separate, num_heads=heads))
            parts.append(blocks)
        return stacked(parts)

    def _parameter(self, name: str) -> Parameter:
        (found,) = (parameter for parameter in self._parameters if parameter.name == name)
        return found

    def licence_files(self) -> list[Path]:
        """Licence, notice and use policy files of a Hugging Face directory, by name."""
        return licence.licence_files(self.path) if self.source_format == "safetensors" else []

    def sha256(self) -> dict[str, str]:
        """The hexadecimal SHA-256 of each of ``files``, by file name; reads all of them."""
        return {path.name: _sha256(path) for path in self.files}


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint and checks all that can be checked without reading weights.

    Args:
        path: a directory with ``config.json`` and safetensors, or a ``.gguf`` file.

    Raises:
        CheckpointError: it isn't a Llama that is supported, or it is incomplete, damaged or a
            pickle.
    """
    if path.is_dir():
        return _open_huggingface(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is no file and no directory; check the path")
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(f"{path} is a pickle: {NEEDS_SAFETENSORS}")
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path} is neither a .gguf file nor a directory; for safetensors, give the directory "
            f"that holds them and {CONFIG}"
        )
    return _open_gguf(path)


def _open_huggingface(directory: Path) -> Checkpoint:
    if not (directory / CONFIG).is_file():
        raise CheckpointError(
            f"{directory} has no {CONFIG}; give a Hugging Face directory or a .gguf file itself"
        )
    with _named(directory):
        config = LlamaConfig.from_huggingface(read_json(directory / CONFIG))
    source = SafetensorsWeights(directory)
    with _named(directory):
        expected = parameters(config, "safetensors")
        # Old checkpoints store the rotary frequencies, which follow from the configuration.
        harmless = {name for name in source.shapes if name.endswith("rotary_emb.inv_freq")}
        if config.tie_embeddings:
            harmless.add(HEAD)
        check_tensors(expected, source.shapes, harmless=harmless)
        if config.tie_embeddings and HEAD in source.shapes:
            _check_tied_head(source)
    return Checkpoint(
        path=directory,
        name=_model_name(directory),
        config=config,
        source_format="safetensors",
        metadata={},
        licence=licence.licence_of_readme(directory),
        files=(directory / CONFIG, *source.files),
        _parameters=expected,
        _source=source,
    )


def _open_gguf(path: Path) -> Checkpoint:
    source = GgufWeights(path)
    with _named(path):
        config = LlamaConfig.from_gguf(
            source.metadata,
            rope_factors=source.rope_factors,
            tie_embeddings=OUTPUT not in source.shapes,
        )
        expected = parameters(config, "gguf")
        check_tensors(expected, source.shapes, harmless={ROPE_FACTORS})
    stated = source.metadata.get("general.name")
    return Checkpoint(
        path=path,
        name=stated if isinstance(stated, str) and stated.isprintable() and stated else path.stem,
        config=config,
        source_format="gguf",
        metadata=source.metadata,
        licence=licence.licence_of_gguf(source.metadata),
        files=(path,),
        _parameters=expected,
        _source=source,
    )


def _check_tied_head(source: SafetensorsWeights) -> None:
    """An output matrix beside a tied embedding says nothing new, or contradicts config.json."""
    if not torch.equal(source.tensor(EMBEDDING), source.tensor(HEAD)):
        raise CheckpointError(
            f"tie_word_embeddings in {CONFIG} is true, but {HEAD} is there and differs from "
            f"{EMBEDDING}; set tie_word_embeddings to false if the model has a head of its own"
        )


def _model_name(directory: Path) -> str:
    """The directory's name, or the repository's where it is a snapshot in Hugging Face's cache."""
    resolved = directory.resolve()
    repository = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return resolved.name


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says which checkpoint a refusal is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be used: {error}") from error
