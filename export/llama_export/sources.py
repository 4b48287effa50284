"""What a bundle is built from: a checkpoint, or made-up weights in a published model's shape."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

from llama_decoder.checkpoint import Checkpoint, open_checkpoint
from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import rope_buffers
from llama_decoder.weights import Array
from llama_export.calibration.windows import calibration_windows
from llama_export.errors import ExportError
from llama_export.gguf_tokenizer import read_gguf_tokenizer
from llama_export.host_pieces import host_pieces
from llama_export.host_weights import Quantised
from llama_export.kept_blocks import as_kept, kept_blocks, kept_types
from llama_export.precision import Precision, in_file_order, store
from llama_export.random_weights import (
    MAX_SEED,
    describe_random,
    random_blocks,
    random_parameters,
    random_shape,
    random_tokenizer,
)
from llama_export.source_tokenizer import SourceTokenizer, read_huggingface_tokenizer
from llama_export.weight_file import Piece
from llama_runtime.bundle import Source
from llama_runtime.errors import BundleError, one_line
from llama_runtime.generation_config import default_params, eos_token_ids

RANDOM = "random"  # the format that a manifest names for made-up weights


class ModelSource(Protocol):
    """A model to build a bundle from."""

    @property
    def name(self) -> str:
        """The model's name, for people."""

    @property
    def config(self) -> LlamaConfig:
        """The model's numbers."""

    @property
    def licence(self) -> str | None:
        """The licence's name, if it is stated."""

    def licence_files(self) -> list[Path]:
        """Licence and notice files that travel with the model."""

    def tokenizer(self) -> SourceTokenizer:
        """The model's tokenizer."""

    def weights(self) -> Iterator[tuple[str, Array]]:
        """Every parameter in float32, one in memory at a time, in the decoder's order."""

    def adapted(self, precision: Precision) -> Precision:
        """The recipe as it is of this model: with what the source keeps as it is."""

    def pieces(self, precision: Precision) -> Iterator[tuple[str, Piece]]:
        """Everything that the weight file holds, as ``write_weights`` takes it."""

    def record(self) -> Source:
        """What the manifest says about it; reads all files of a checkpoint."""


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint as the source of a bundle; see ``ModelSource``."""

    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """See ``ModelSource``."""
        return self.checkpoint.name

    @property
    def config(self) -> LlamaConfig:
        """See ``ModelSource``."""
        return self.checkpoint.config

    @property
    def licence(self) -> str | None:
        """See ``ModelSource``."""
        return self.checkpoint.licence

    def licence_files(self) -> list[Path]:
        """See ``ModelSource``."""
        return self.checkpoint.licence_files()

    def tokenizer(self) -> SourceTokenizer:
        """See ``read_tokenizer``."""
        return read_tokenizer(self.checkpoint)

    def weights(self) -> Iterator[tuple[str, Array]]:
        """See ``ModelSource``."""
        return self.checkpoint.weights()

    def pieces(self, precision: Precision) -> Iterator[tuple[str, Piece]]:
        """See ``ModelSource``; what is quantised for the CPU is rounded on the calibration text."""
        config, tables = self.config, _tables(self.config)
        if not precision.is_rounded:
            return store(precision, chain(self.weights(), tables))
        windows = None
        if precision.calibrated and not (precision.kept and precision.cache is None):
            text = self.tokenizer().tokenizer_json
            windows = calibration_windows(text, config.max_positions)
        return host_pieces(config, precision, self.weights, tables, windows, self.kept(precision))

    def adapted(self, precision: Precision) -> Precision:
        """See ``ModelSource``."""
        return as_kept(self.checkpoint, precision)

    def kept(self, precision: Precision) -> Iterator[tuple[str, Quantised]] | None:
        """The parameters, where those of the file are multiplied with as they are; else None."""
        found = kept_types(self.checkpoint) if precision.kept else None
        return None if found is None else kept_blocks(self.checkpoint, found)

    def record(self) -> Source:
        """Name and hash; of several files, the hash of what sha256sum prints."""
        digests = self.checkpoint.sha256()
        if len(digests) == 1:
            (digest,) = digests.values()
        else:
            lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
            digest = hashlib.sha256(lines.encode()).hexdigest()
        name = one_line(self.checkpoint.path.resolve().name)
        return Source(format=self.checkpoint.source_format, file=name, sha256=digest)


@dataclass(frozen=True, slots=True)
class RandomSource:
    """Made-up weights as the source of a bundle; see ``ModelSource``.

    Attributes:
        shape: name of a published model.
        seed: what the weights are made from.
        config: the shape's numbers.
    """

    shape: str
    seed: int
    config: LlamaConfig

    @property
    def name(self) -> str:
        """Says that it is none of the model that it has the shape of."""
        return f"{self.shape} with random weights, seed {self.seed}"

    @property
    def licence(self) -> str | None:
        """Random numbers have none."""
        return None

    def licence_files(self) -> list[Path]:
        """There are none."""
        return []

    def tokenizer(self) -> SourceTokenizer:
        """See ``random_tokenizer``."""
        return random_tokenizer(self.config.vocab_size)

    def weights(self) -> Iterator[tuple[str, Array]]:
        """See ``ModelSource``."""
        return random_parameters(self.config, self.seed)

    def adapted(self, precision: Precision) -> Precision:
        """See ``ModelSource``."""
        return precision

    def pieces(self, precision: Precision) -> Iterator[tuple[str, Piece]]:
        """See ``ModelSource``; blocks are made and stored by all processors.

        What is quantised for the CPU is rounded to the nearest: there is nothing to calibrate.
        """
        if precision.is_rounded:
            tables = _tables(self.config)
            return host_pieces(self.config, precision, self.weights, tables, None)
        blocks = random_blocks(self.config, self.seed, precision.encode)
        return chain(in_file_order(precision, blocks), store(precision, _tables(self.config)))

    def record(self) -> Source:
        """The shape's name, and the hash of a text that tells these weights from all others."""
        text = describe_random(self.config, self.seed)
        return Source(RANDOM, self.shape, hashlib.sha256(text.encode()).hexdigest())


def open_source(model: Path | str, random_seed: int | None = None) -> ModelSource:
    """Open what a bundle is to be built from.

    Args:
        model: a Hugging Face directory or a ``.gguf`` file; with a seed, the name of a shape.
        random_seed: makes weights up instead of reading some.

    Raises:
        CheckpointError: the checkpoint can't be used.
        ExportError: there is no shape of that name, or the seed isn't in 0..2^63-1.
    """
    if random_seed is None:
        return CheckpointSource(open_checkpoint(Path(model)))
    if not 0 <= random_seed <= MAX_SEED:
        raise ExportError(f"the seed is {random_seed}; it must be a number in 0..2^63-1")
    return RandomSource(str(model), random_seed, random_shape(str(model)))


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


def _tables(config: LlamaConfig) -> Iterator[tuple[str, Array]]:
    return ((name, table.numpy()) for name, table in rope_buffers(config))
