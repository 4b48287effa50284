"""What the fp32 source thinks of the evaluation texts: a file that is made with the bundle.

So the quality of a bundle can be measured again without the source and without PyTorch. For each
place of the texts the file holds the log-probability of the token that follows, the likeliest
tokens with theirs, that of all others together, and some of those others with theirs, drawn as the
source has them (``partition`` says what for). The bytes of ``reference_logprobs.bin``, all numbers
little-endian and nothing between them:

    magic         8 bytes, "caravan1"
    size          uint32, of the header
    header        JSON: texts_sha256, vocab_size (V), top (K), samples (M), and windows, a list of
                  [kind, number of tokens]
    tokens        uint32 [T], of all windows
    targets       float32 [P], log-probability of the token that follows
    top_ids       uint16 or, if V is over 65,536, uint32 [P, K], likeliest first
    sample_ids    the same type [P, M]
    codes         uint16 [P, K + 1], negative log-probability of the likeliest and of the rest
    sample_codes  uint16 [P, M], that of the samples

P is the number of tokens that follow another one in their window. Codes count 1/2048 nat, so they
are off by half of that at most; what is less likely than e^-32 is written as that likely.
Probabilities are scaled to sum to 1 when they are read, so the rounding changes a divergence by
some 1e-8 nats only.

Standard library and numpy only: the exporter writes what is read here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from llama_runtime.bundle import Bundle
from llama_runtime.bundle_limits import MAX_REFERENCE_BYTES, REFERENCE_LOGPROBS
from llama_runtime.contract import Geometry
from llama_runtime.errors import BundleError
from llama_runtime.evaluation.partition import Floats, Kept, TokenIds

MAGIC = b"caravan1"
STEPS = 2048  # of a code in a nat
MOST = 2**16 - 1  # a code
MAX_HEADER_BYTES = 2**16
MAX_TOP = 1024
MAX_SAMPLES = 256
# The rounding of 1,025 codes changes a sum by a 4,000th part of it.
_SUM_TOLERANCE = 1e-3
_HEADER = struct.Struct("<8sI")

Codes = npt.NDArray[np.uint16]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a text, with nothing before it.

    Attributes:
        kind: of the text.
        tokens: ids, two at least.
    """

    kind: str
    tokens: tuple[int, ...]

    @property
    def num_targets(self) -> int:
        """Tokens that follow another one, and are predicted."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Reference:
    """The contents of the file; see the module.

    Attributes:
        texts_sha256: of the texts that the windows were cut from.
        vocab_size: V.
        windows: in the order of the rows of what follows.
        targets: float32 [P].
        top_ids: [P, K].
        sample_ids: [P, M].
        codes: uint16 [P, K + 1].
        sample_codes: uint16 [P, M].
    """

    texts_sha256: str
    vocab_size: int
    windows: tuple[Window, ...]
    targets: npt.NDArray[np.float32]
    top_ids: TokenIds
    sample_ids: TokenIds
    codes: Codes
    sample_codes: Codes

    @cached_property
    def starts(self) -> Ints:
        """The first row of each window, and the number of all rows."""
        return np.cumsum([0, *(window.num_targets for window in self.windows)])

    def kept(self, rows: slice) -> Kept:
        """What is known of the source's distributions at some places."""
        return decoded(self.codes[rows], self.sample_codes[rows])

    def to_bytes(self) -> bytes:
        """The file."""
        header = json.dumps(
            {
                "texts_sha256": self.texts_sha256,
                "vocab_size": self.vocab_size,
                "top": self.top_ids.shape[1],
                "samples": self.sample_ids.shape[1],
                "windows": [[window.kind, len(window.tokens)] for window in self.windows],
            }
        ).encode()
        tokens = [token for window in self.windows for token in window.tokens]
        arrays: tuple[npt.NDArray[Any], ...] = (
            np.array(tokens, "<u4"),
            self.targets.astype("<f4"),
            self.top_ids.astype(_id_type(self.vocab_size)),
            self.sample_ids.astype(_id_type(self.vocab_size)),
            self.codes.astype("<u2"),
            self.sample_codes.astype("<u2"),
        )
        parts = [_HEADER.pack(MAGIC, len(header)), header]
        return b"".join([*parts, *(array.tobytes() for array in arrays)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """Read the file.

        Raises:
            ValueError: it isn't one; the message says in what, in a few words.
        """
        if len(data) < _HEADER.size:
            raise ValueError("it is cut off")
        magic, size = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ValueError("it begins with other bytes than such a file")
        end = _HEADER.size + size
        if size > MAX_HEADER_BYTES or end > len(data):
            raise ValueError(f"its header has {size:,} bytes")
        header = _Header.parsed(data[_HEADER.size : end])
        return header.read(memoryview(data)[end:])


def encoded(logprobs: Floats) -> Codes:
    """Log-probabilities as codes."""
    return np.clip(np.rint(-STEPS * logprobs), 0, MOST).astype(np.uint16)


def decoded(codes: Codes, sample_codes: Codes) -> Kept:
    """Log-probabilities of codes, those of each row scaled so that its parts sum to 1."""
    parts, samples = (some / -np.float64(STEPS) for some in (codes, sample_codes))
    excess = np.log(np.exp(parts).sum(axis=1, keepdims=True))
    return Kept(parts - excess, samples - excess)


def read_reference(bundle: Bundle) -> Reference:
    """The reference that a bundle holds.

    Raises:
        BundleError: it holds none, or what it holds is none for its model.
    """
    path = bundle.path / REFERENCE_LOGPROBS
    if REFERENCE_LOGPROBS not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.path} was built without {REFERENCE_LOGPROBS}, which its quality is measured "
            "against: rebuild it with llama-export build --quality"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_REFERENCE_BYTES + 1)
        reference = Reference.from_bytes(data)
        _check_model(reference, bundle.manifest.geometry)
    except OSError as error:
        raise BundleError(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise BundleError(
            f"{path} is not a reference of this bundle, {error}: rebuild it with llama-export build"
        ) from error
    return reference


def _check_model(reference: Reference, geometry: Geometry) -> None:
    if reference.vocab_size != geometry.vocab_size:
        raise ValueError(
            f"it is of a vocabulary of {reference.vocab_size:,} tokens and the model has "
            f"{geometry.vocab_size:,}"
        )
    longest = max(len(window.tokens) for window in reference.windows)
    if longest > geometry.max_positions:
        raise ValueError(
            f"a window has {longest:,} tokens and the model {geometry.max_positions:,} positions"
        )


@dataclass(frozen=True, slots=True)
class _Header:
    """What the header says, checked."""

    texts_sha256: str
    vocab_size: int
    top: int
    samples: int
    windows: Sequence[tuple[str, int]]

    @classmethod
    def parsed(cls, text: bytes) -> _Header:
        """Raises ``ValueError`` if it isn't what ``Reference.to_bytes`` writes."""
        try:
            found = json.loads(text)
            windows = [(kind, count) for kind, count in found.pop("windows")]
            header = cls(windows=windows, **found)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ValueError("its header is not what it should be") from None
        counts = [count for _, count in windows]
        numbers = [header.vocab_size, header.top, header.samples, *counts]
        texts = [header.texts_sha256, *(kind for kind, _ in windows)]
        if not all(type(number) is int for number in numbers) or not windows:
            raise ValueError("its header is not what it should be")
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise ValueError("its header is not what it should be")
        most = min(MAX_TOP, header.vocab_size - 1)
        if not 1 <= header.top <= most or header.vocab_size > 2**31:
            raise ValueError(f"it has {header.top} likeliest tokens of {header.vocab_size}")
        if not 1 <= header.samples <= MAX_SAMPLES:
            raise ValueError(f"it has {header.samples} samples of a place")
        if min(counts) < 2:
            raise ValueError("a window has fewer than 2 tokens")
        return header

    def read(self, data: memoryview) -> Reference:
        """The arrays behind the header. Raises ``ValueError`` if they can't be."""
        num_tokens = sum(count for _, count in self.windows)
        rows = num_tokens - len(self.windows)
        forms = (
            ("<u4", (num_tokens,)),
            ("<f4", (rows,)),
            (_id_type(self.vocab_size), (rows, self.top)),
            (_id_type(self.vocab_size), (rows, self.samples)),
            ("<u2", (rows, self.top + 1)),
            ("<u2", (rows, self.samples)),
        )
        sizes = [np.dtype(kind).itemsize * prod(shape) for kind, shape in forms]
        if len(data) != sum(sizes):
            raise ValueError(f"{len(data):,} bytes follow its header instead of {sum(sizes):,}")
        ends = np.cumsum(sizes).tolist()
        arrays: list[npt.NDArray[Any]] = [
            np.frombuffer(data[end - size : end], kind).reshape(shape)
            for (kind, shape), size, end in zip(forms, sizes, ends, strict=True)
        ]
        _check_values(self.vocab_size, *arrays[:5])
        lengths = np.cumsum([0, *(count for _, count in self.windows)]).tolist()
        tokens = arrays[0].tolist()
        windows = tuple(
            Window(kind, tuple(tokens[start : start + count]))
            for (kind, count), start in zip(self.windows, lengths[:-1], strict=True)
        )
        return Reference(self.texts_sha256, self.vocab_size, windows, *arrays[1:])


def _check_values(
    vocab_size: int,
    tokens: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    top_ids: npt.NDArray[Any],
    sample_ids: npt.NDArray[Any],
    codes: npt.NDArray[Any],
) -> None:
    highest = max(int(ids.max()) for ids in (tokens, top_ids, sample_ids))
    if highest >= vocab_size:
        raise ValueError(f"it names token {highest:,} of {vocab_size:,}")
    if not (np.diff(np.sort(top_ids, axis=1).astype(np.int64), axis=1) > 0).all():
        raise ValueError("it names a token twice among the likeliest of one place")
    if not (np.isfinite(targets) & (targets <= 0)).all():
        raise ValueError("a log-probability is no finite number up to 0")
    sums = np.exp(codes / -np.float64(STEPS)).sum(axis=1)
    if not (np.abs(sums - 1) <= _SUM_TOLERANCE).all():
        raise ValueError("the probabilities of one place don't sum to 1")


def _id_type(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"
