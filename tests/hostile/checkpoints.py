"""Checkpoints damaged at random, each from a good one, by a seed.

Four good ones are the start: safetensors in one file, in two with an index, and GGUF files with
float32 and with quantised weights. A mutant changes one file of one of them, mostly where its
structure is: bits, pieces, cuts, numbers set to the ends of their range, parts of JSON replaced.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

EXTREMES = (0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1,
    10**9,
    2**31,
    2**63,
    10**30,
    0.5,
    -1.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "x" * 100_000,
    "../../etc/passwd",
    "\ud800",
    "\x00",
    [],
    {},
    [0, 10**12],
    [10**9, 10**9],
    {"a": 1},
)


def write_sources(folder: Path) -> list[Path]:
    """Write the good checkpoints, and return where each is."""
    from tests.tiny_model import write_tiny_model

    single = folder / "single"
    single.mkdir()
    write_tiny_model(single)
    (single / "generation_config.json").write_text('{"eos_token_id": [2], "temperature": 0.5}')
    (single / "LICENSE").write_text("terms")
    (single / "README.md").write_text("---\nlicense: mit\n---\n")
    sharded = shutil.copytree(single, folder / "sharded")
    _shard(sharded)
    return [single, sharded, *(_write_gguf(folder, kind) for kind in ("F32", "Q4_0"))]


def _shard(directory: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    places = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        held = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(held, directory / file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_gguf(folder: Path, kind: str) -> Path:
    import gguf
    import numpy as np

    from llama_decoder.tiny import random_weights, tiny_config
    from llama_decoder.weights import parameters
    from tests.tiny_model import byte_level_tokenizer

    config = tiny_config()
    path = folder / f"tiny-{kind}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    ids = byte_level_tokenizer().get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    tokens += ["ab", *(f"<{i}>" for i in range(config.vocab_size - len(tokens) - 1))]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    weights = random_weights(config, seed=0)
    for parameter in parameters(config, "gguf"):
        ends = np.cumsum([part.shape[0] for part in parameter.parts])[:-1]
        pieces = np.split(weights[parameter.name], ends)
        for part, piece in zip(parameter.parts, pieces, strict=True):
            stored = gguf.GGMLQuantizationType[kind if piece.ndim > 1 else "F32"]
            writer.add_tensor(part.name, gguf.quants.quantize(piece, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mutate(source: Path, place: Path, seed: int) -> tuple[Path, str]:
    """Write a mutant of a checkpoint, and say what was done.

    Args:
        source: a good checkpoint.
        place: an empty folder.
        seed: the same seed makes the same mutant.

    Returns:
        The mutant, and a few words.
    """
    rng = random.Random(seed)
    if source.is_file():
        target = place / source.name
        data = source.read_bytes()
        name, mutation = rng.choice(BINARY)
        target.write_bytes(mutation(data, rng))
        return target, f"{source.name}: {name}"
    target = place / source.name
    shutil.copytree(source, target)
    file = target / rng.choice(sorted(path.name for path in target.glob("*.*[nst]")))
    data = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        name, mutation = rng.choice(TEXT)
    elif file.suffix == ".safetensors" and rng.random() < 0.6:
        name, mutation = rng.choice(HEADER)
    else:
        name, mutation = rng.choice(BINARY)
    file.write_bytes(mutation(data, rng))
    return target, f"{source.name}/{file.name}: {name}"


# --- bytes ---------------------------------------------------------------------------------------


def _place(data: bytes, rng: random.Random) -> int:
    """Mostly in the structure, which lies at the beginning."""
    end = min(len(data), 12_000) if rng.random() < 0.8 else len(data)
    return rng.randrange(max(1, end))


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, 8, len(data) - 1, _place(data, rng), rng.randrange(len(data))))]


def _extend(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 4096, 10**6)))


def _splice(data: bytes, rng: random.Random) -> bytes:
    at, size = _place(data, rng), rng.randrange(1, 200)
    start = _place(data, rng)
    piece = rng.choice((b"", bytes(size), b"\xff" * size, data[start : start + size]))
    return data[:at] + piece + data[at + rng.choice((0, size)) :]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Some eight or four bytes as an extreme number."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.choice((0, 4, 8, 16, _place(data, rng), _place(data, rng)))
        value = struct.pack("<Q", rng.choice(EXTREMES))[: rng.choice((4, 8))]
        changed[at : at + len(value)] = value
    return bytes(changed)


def _not_finite(data: bytes, rng: random.Random) -> bytes:
    """Some weights as NaN or infinity, in float32 and in float16."""
    value = rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\x00\x7e\x00\x7e", b"\x00\x7c\x00\xfc"))
    at = len(data) // 2 // 4 * 4
    return data[:at] + value * rng.choice((1, 1000)) + data[at:][: len(data)]


BINARY: list[tuple[str, Mutation]] = [
    ("bits flipped", _flip),
    ("cut", _cut),
    ("extended", _extend),
    ("spliced", _splice),
    ("extreme numbers", _number),
    ("extreme numbers", _number),
    ("weights not finite", _not_finite),
]

# --- JSON ----------------------------------------------------------------------------------------


def _replace(value: Any, rng: random.Random) -> Any:
    """One part of a JSON value, taken at random on the way down, as something else."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        change = rng.random()
        if change < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if change < 0.2:
            return {**value, f"{key}x": value[key]}
        if change < 0.3:
            return {**value, key: value[rng.choice(list(value))]}
        return {**value, key: _replace(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _replace(value[at], rng), *value[at + 1 :]]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 10**9))
    return rng.choice(VALUES)


def _json(data: bytes, rng: random.Random) -> bytes:
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 3))):
        value = _replace(value, rng)
    return json.dumps(value).encode()


def _deep(data: bytes, rng: random.Random) -> bytes:
    depth = rng.choice((100, 1_000, 100_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return (
        data.rstrip().removesuffix(b"}")
        + b', "x": '
        + opening * depth
        + b"1"
        + closing * depth
        + b"}"
    )


def _digits(data: bytes, rng: random.Random) -> bytes:
    at = next((i for i in range(_place(data, rng), len(data)) if data[i : i + 1].isdigit()), 0)
    return data[:at] + b"9" * rng.choice((10, 400, 5_000)) + data[at:]


TEXT: list[tuple[str, Mutation]] = [
    ("JSON changed", _json),
    ("JSON changed", _json),
    ("JSON changed", _json),
    ("nested deep", _deep),
    ("many digits", _digits),
]


def _header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors header whose JSON is changed, under a length that fits or nearly does."""
    size = int.from_bytes(data[:8], "little")
    changed = rng.choice(TEXT)[1](data[8 : 8 + size], rng)
    length = len(changed) + rng.choice((0, 0, 0, 1, -1))
    return length.to_bytes(8, "little") + changed + data[8 + size :]


def _overlap(data: bytes, rng: random.Random) -> bytes:
    """One tensor said to lie where another does, or beyond the file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    start, end = header[rng.choice(names)]["data_offsets"]
    shift = rng.choice((0, 4, -4, len(data), 2**60))
    header[rng.choice(names)]["data_offsets"] = [start + shift, end + shift]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


HEADER: list[tuple[str, Mutation]] = [
    ("header changed", _header),
    ("header changed", _header),
    ("tensors moved", _overlap),
]
