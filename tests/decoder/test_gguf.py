"""GGUF files: the real one, and one of each tensor type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.config import LlamaConfig
from llama_decoder.errors import CheckpointError
from llama_decoder.gguf_file import GgufWeights
from llama_decoder.gguf_header import SUPPORTED
from llama_decoder.tiny import random_weights, tiny_config
from llama_decoder.weights import Array, parameters

Kind = gguf.GGMLQuantizationType
Tensors = dict[str, tuple[np.ndarray, Any]]  # as stored, and its type

# Rows of 256 values, as the K types need.
CONFIG = tiny_config(
    vocab_size=32,
    hidden_size=256,
    intermediate_size=256,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=float(np.float32(1e-5)),  # GGUF metadata holds it as float32
)
# Where in a block of the types that gguf can't quantise to the float16 scales are.
SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """As ``LlamaModel.permute`` of llama.cpp's ``convert_hf_to_gguf.py`` has it."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def converted(config: LlamaConfig, seed: int) -> dict[str, Array]:
    """The random weights of ``seed``, named and permuted as llama.cpp's converter does."""
    weights = random_weights(config, seed)
    tensors = {}
    for parameter in parameters(config, "gguf"):
        ends = np.cumsum([part.shape[0] for part in parameter.parts])[:-1]
        pieces = np.split(weights[parameter.name], ends)
        for part, piece in zip(parameter.parts, pieces, strict=True):
            heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(
                part.name.split(".")[-2]
            )
            tensors[part.name] = permute(piece, heads) if heads else piece
    return tensors


def stored(tensors: dict[str, Array], kind: str = "F32") -> Tensors:
    """Matrices as ``kind``, vectors as F32."""
    rng = np.random.default_rng(5)
    return {
        name: (value, Kind.F32) if value.ndim == 1 else (encode(value, kind, rng), Kind[kind])
        for name, value in tensors.items()
    }


def encode(value: np.ndarray, kind: str, rng: np.random.Generator) -> np.ndarray:
    """The values in the type, or random blocks of it where gguf can't quantise."""
    if kind not in SCALES:
        return np.asarray(gguf.quants.quantize(value, Kind[kind]))
    width, num_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    blocks = rng.integers(0, 256, (value.size // width, num_bytes), np.uint8)
    for at in SCALES[kind]:
        scales = rng.uniform(0.001, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(len(value), -1)


def write(path: Path, config: LlamaConfig, tensors: Tensors, **metadata: str) -> Path:
    """A GGUF file as gguf's own writer makes it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, text in metadata.items():
        writer.add_string(f"general.{key}", text)
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf", CONFIG, stored(converted(CONFIG, 0)))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_header_of_the_real_model_is_what_gguf_reads(real_gguf: Path) -> None:
    reader = gguf.GGUFReader(real_gguf)
    weights = GgufWeights(real_gguf)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert dict(weights.metadata) == fields
    shapes = {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors}
    assert dict(weights.shapes) == shapes


def test_the_weights_of_the_real_model_are_those_of_gguf(real_gguf: Path) -> None:
    """To the bit, in every layer, with q and k as they were trained."""
    checkpoint = open_checkpoint(real_gguf)
    config = checkpoint.config
    entries = GgufWeights(real_gguf)._tensors
    raw = real_gguf.read_bytes()

    def theirs(name: str) -> np.ndarray:
        entry = entries[name]
        data = np.frombuffer(raw, np.uint8, entry.num_bytes, entry.offset)
        rows = data.reshape(*entry.shape[:-1], -1)
        return np.asarray(gguf.quants.dequantize(rows, entry.type)).reshape(entry.shape)

    def fused(layer: str) -> np.ndarray:
        q, k = theirs(f"{layer}.attn_q.weight"), theirs(f"{layer}.attn_k.weight")
        half = config.head_dim // 2
        places = np.r_[0 : 2 * half : 2, 1 : 2 * half : 2]  # even rows, then odd ones
        q = q.reshape(config.num_heads, 2 * half, -1)[:, places].reshape(q.shape)
        k = k.reshape(config.num_kv_heads, 2 * half, -1)[:, places].reshape(k.shape)
        return np.concatenate([q, k, theirs(f"{layer}.attn_v.weight")])

    expected = {
        "model.embed_tokens.weight": theirs("token_embd.weight"),
        "model.norm.weight": theirs("output_norm.weight"),
    }
    for i in range(config.num_layers):
        mine = f"model.layers.{i}"
        expected |= {
            f"{mine}.input_layernorm.weight": theirs(f"blk.{i}.attn_norm.weight"),
            f"{mine}.self_attn.qkv_proj.weight": fused(f"blk.{i}"),
            f"{mine}.self_attn.o_proj.weight": theirs(f"blk.{i}.attn_output.weight"),
            f"{mine}.post_attention_layernorm.weight": theirs(f"blk.{i}.ffn_norm.weight"),
            f"{mine}.mlp.gate_proj.weight": theirs(f"blk.{i}.ffn_gate.weight"),
            f"{mine}.mlp.up_proj.weight": theirs(f"blk.{i}.ffn_up.weight"),
            f"{mine}.mlp.down_proj.weight": theirs(f"blk.{i}.ffn_down.weight"),
        }
    given = dict(checkpoint.weights())
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(given[name], value), name


def test_the_real_model_says_its_name_and_licence(real_gguf: Path) -> None:
    checkpoint = open_checkpoint(real_gguf)
    assert checkpoint.name == "Smollm2 135M 8k Lc100K Mix1 Ep2"
    assert checkpoint.licence == "apache-2.0"
    assert checkpoint.licence_files() == []
    assert checkpoint.config.tie_embeddings
    assert checkpoint.metadata["tokenizer.ggml.pre"] == "smollm"


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_type_is_dequantised_as_gguf_does(kind: str, tmp_path: Path) -> None:
    tensors = stored(converted(CONFIG, 1), kind)
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", CONFIG, tensors))
    assert checkpoint.config == CONFIG
    values = {
        name: np.asarray(gguf.quants.dequantize(value, qtype))
        for name, (value, qtype) in tensors.items()
    }
    read = dict(checkpoint.weights())
    layer = "model.layers.0."
    for name, theirs in {
        "model.embed_tokens.weight": "token_embd",
        f"{layer}self_attn.o_proj.weight": "blk.0.attn_output",
        f"{layer}mlp.gate_proj.weight": "blk.0.ffn_gate",
        f"{layer}mlp.up_proj.weight": "blk.0.ffn_up",
        f"{layer}mlp.down_proj.weight": "blk.0.ffn_down",
        "lm_head.weight": "output",
    }.items():
        expected = values[f"{theirs}.weight"]
        assert np.isfinite(expected).all()
        assert np.array_equal(read[name], expected), name
    qkv = read[f"{layer}self_attn.qkv_proj.weight"]
    q, k, v = np.split(qkv, [4 * 64, 6 * 64])
    assert np.array_equal(permute(q, 4), values["blk.0.attn_q.weight"])
    assert np.array_equal(permute(k, 2), values["blk.0.attn_k.weight"])
    assert np.array_equal(v, values["blk.0.attn_v.weight"])


def test_a_converted_model_reads_back_as_it_was(tiny: Path) -> None:
    read = dict(open_checkpoint(tiny).weights())
    expected = random_weights(CONFIG, 0)
    assert list(read) == list(expected)
    for name, value in read.items():
        assert value.dtype == np.float32
        assert value.flags.writeable
        assert np.array_equal(value, expected[name]), name


def test_the_converter_does_move_rows() -> None:
    """Else the tests above would pass without undoing it."""
    moved, plain = converted(CONFIG, 0)["blk.0.attn_q.weight"], random_weights(CONFIG, 0)
    qkv = plain["model.layers.0.self_attn.qkv_proj.weight"]
    assert not np.array_equal(moved, qkv[: len(moved)])


def test_a_large_tensor_is_dequantised_in_slabs_without_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "tiny.gguf", CONFIG, stored(converted(CONFIG, 2), "Q4_0"))
    whole = dict(open_checkpoint(path).weights())
    monkeypatch.setattr("llama_decoder.gguf_file.SLAB", 5 * 256)
    for name, value in open_checkpoint(path).weights():
        assert np.array_equal(value, whole[name])


def test_a_file_without_output_is_tied(tmp_path: Path) -> None:
    tensors = stored(converted(CONFIG, 0))
    del tensors["output.weight"]
    checkpoint = open_checkpoint(write(tmp_path / "tiny.gguf", CONFIG, tensors))
    assert checkpoint.config.tie_embeddings
    assert "lm_head.weight" not in dict(checkpoint.weights())


def test_rope_factors_are_read_into_the_config(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    tensors = stored(converted(CONFIG, 0)) | {"rope_freqs.weight": (factors, Kind.F32)}
    config = open_checkpoint(write(tmp_path / "tiny.gguf", CONFIG, tensors)).config
    assert config.rope_factors == tuple(factors.tolist())


@pytest.mark.parametrize("shape", [(31,), (32, 1), (100_000,)])
def test_misshapen_rope_factors_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = stored(converted(CONFIG, 0)) | {"rope_freqs.weight": (np.ones(shape, "f4"), Kind.F32)}
    assert "rope_f" in refusal(write(tmp_path / "tiny.gguf", CONFIG, tensors))


def test_faults_of_the_tensors_are_listed(tmp_path: Path) -> None:
    tensors = stored(converted(CONFIG, 0))
    del tensors["blk.0.attn_k.weight"]
    tensors["blk.0.attn_q.bias"] = (np.ones(256, np.float32), Kind.F32)
    message = refusal(write(tmp_path / "tiny.gguf", CONFIG, tensors))
    assert "1 missing (blk.0.attn_k.weight)" in message
    assert "1 unexpected ('blk.0.attn_q.bias')" in message


def test_other_types_are_refused_by_name(tmp_path: Path) -> None:
    tensors = stored(converted(CONFIG, 0))
    for name, kind in {"blk.0.ffn_up.weight": Kind.Q2_K, "blk.0.ffn_down.weight": Kind.I32}.items():
        width, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((256, 256 // width * size), np.uint8)
        tensors[name] = (data.view(np.int32) if kind == Kind.I32 else data, kind)
    assert "tensors of I32, Q2_K; only F32" in refusal(
        write(tmp_path / "tiny.gguf", CONFIG, tensors)
    )


@pytest.mark.parametrize(
    ("metadata", "name", "licence"),
    [
        ({}, "tiny", None),
        ({"name": "Tiny", "license": "mit"}, "Tiny", "mit"),
        ({"name": "two\nlines"}, "tiny", None),
        ({"license": "other", "license.name": "own"}, "tiny", "own"),
    ],
)
def test_name_and_licence_are_what_the_metadata_states(
    metadata: dict[str, str], name: str, licence: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "tiny.gguf", CONFIG, stored(converted(CONFIG, 0)), **metadata)
    checkpoint = open_checkpoint(path)
    assert (checkpoint.name, checkpoint.licence) == (name, licence)
