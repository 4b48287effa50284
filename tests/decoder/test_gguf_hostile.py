"""A hostile or damaged GGUF file is one clear error."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.errors import CheckpointError
from llama_decoder.tiny import tiny_config
from llama_decoder.weights import parameters


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name.encode()) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return string(name.encode()) + shape + struct.pack("<IQ", kind, offset)


def header(
    keys: list[bytes], tensors: list[bytes], version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    start = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys)
    return start + b"".join(keys) + b"".join(tensors)


ARCHITECTURE = key("general.architecture", 8, string(b"llama"))
U32 = struct.pack("<I", 1)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "another format": (b"PNG this is not", "not a GGUF file"),
    "version 1": (header([], [], version=1), "version is 1"),
    "big-endian": (b"GGUF\x00\x00\x00\x03" + bytes(16), "little-endian"),
    "tensors without end": (header([], [], counts=(2**63, 0)), "the limit is 65536"),
    "keys without end": (header([], [], counts=(0, 2**63)), "the limit is 65536"),
    "string without end": (
        header([struct.pack("<Q", 2**64 - 1)], [], counts=(0, 1)),
        "header is damaged",
    ),
    "array without end": (
        header([key("a", 9, struct.pack("<IQ", 4, 2**62))], []),
        "header is damaged",
    ),
    "strings without end": (
        header([key("a", 9, struct.pack("<IQ", 8, 2**62))], []),
        "header is damaged",
    ),
    "array of arrays": (header([key("a", 9, struct.pack("<IQ", 9, 1))], []), "of type 9"),
    "unknown value type": (header([key("a", 99, b"")], []), "of type 99"),
    "not UTF-8": (header([key("a", 8, string(b"\xff"))], []), "not UTF-8"),
    "key twice": (header([key("a", 4, U32), key("a", 4, U32)], []), "'a' twice"),
    "alignment 0": (header([key("general.alignment", 4, bytes(4))], []), "power of two"),
    "alignment 3": (header([key("general.alignment", 4, b"\x03\0\0\0")], []), "power of two"),
    "alignment huge": (
        header([key("general.alignment", 4, struct.pack("<I", 2**31))], []),
        "power of two",
    ),
    "alignment a string": (header([key("general.alignment", 8, string(b"x"))], []), "whole number"),
    "tensor twice": (header([], [tensor("a", [1]), tensor("a", [1])]), "two tensors"),
    "no dimensions": (header([], [tensor("a", [])]), "0 dimensions"),
    "five dimensions": (header([], [tensor("a", [1] * 5)]), "5 dimensions"),
    "dimension 0": (header([], [tensor("a", [4, 0])]), "dimension of 0"),
    "overflowing product": (header([], [tensor("a", [2**62, 2**62])]), "fetch the file again"),
    "unknown tensor type": (header([], [tensor("a", [1], kind=77)]), "type 77"),
    "broken block": (header([], [tensor("a", [33], kind=2)]), "multiple of 32"),
    "offset beyond": (header([], [tensor("a", [1], offset=2**63)]), "must follow"),
    "overlapping": (header([], [tensor("a", [8]), tensor("b", [8])]) + bytes(99), "must follow"),
    "no data": (header([], [tensor("a", [8])]), "fetch the file again"),
    "no architecture": (header([], []), "general.architecture"),
    "another model": (header([key("general.architecture", 8, string(b"bert"))], []), "'bert'"),
    "sizes missing": (header([ARCHITECTURE], []), "llama.embedding_length"),
}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (struct.pack("<IQ", 8, 15_000_000), "15000000 elements or more; the limit is 2097152"),
        (struct.pack("<IQ", 0, 120_000_000), "120000000 elements or more"),
        (struct.pack("<IQ", 7, 2_097_153), "2097153 elements or more"),
    ],
)
def test_arrays_of_a_sparse_file_are_refused_before_they_are_read(
    value: bytes, said: str, tmp_path: Path
) -> None:
    """Empty strings in a hole of a file: 15 million objects from no bytes at all."""
    path = tmp_path / "hostile.gguf"
    path.write_bytes(header([key("a", 9, value)], []))
    os.truncate(path, 127_000_000)
    assert said in refusal(path)


def test_a_string_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(header([key("a", 8, struct.pack("<Q", 2**22 + 1))], []))
    os.truncate(path, 2**23)
    assert "a string of its header has 4194305 bytes; the limit is 4194304" in refusal(path)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_error(case: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    content, said = HOSTILE[case]
    path.write_bytes(content)
    assert said in refusal(path)


def sound() -> tuple[bytes, int]:
    """A file without a fault, and the size of its header."""
    config = tiny_config(vocab_size=2, hidden_size=2, intermediate_size=1, num_layers=1)
    numbers = {
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
    }
    keys = [key(f"llama.{name}", 4, struct.pack("<I", value)) for name, value in numbers.items()]
    keys.append(key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5)))
    keys.append(key("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + string(b"a") * 2))
    tensors, offset = [], 0
    for part in (part for parameter in parameters(config, "gguf") for part in parameter.parts):
        tensors.append(tensor(part.name, list(reversed(part.shape)), offset=offset))
        offset += -(-4 * int(np.prod(part.shape)) // 32) * 32
    content = header([ARCHITECTURE, *keys], tensors)
    return content + bytes(-len(content) % 32) + bytes(offset), len(content)


def test_the_file_that_is_damaged_below_is_sound(tmp_path: Path) -> None:
    (tmp_path / "sound.gguf").write_bytes(sound()[0])
    assert open_checkpoint(tmp_path / "sound.gguf").config.vocab_size == 2


def each_prefix(data: bytes, size: int) -> list[bytes]:
    return [data[:end] for end in range(0, size, 7)]


def each_flip(data: bytes, size: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    changes = zip(rng.integers(0, size, 500), rng.integers(256, size=500), strict=True)
    return [data[:at] + bytes([value]) + data[at + 1 :] for at, value in changes]


@pytest.mark.parametrize("damage", [each_prefix, each_flip])
def test_a_damaged_header_is_an_error_or_harmless(
    damage: Callable[[bytes, int], list[bytes]], tmp_path: Path
) -> None:
    path = tmp_path / "damaged.gguf"
    refused = 0
    for damaged in damage(*sound()):
        path.write_bytes(damaged)
        try:
            open_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 100
