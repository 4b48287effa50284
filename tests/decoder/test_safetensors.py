"""Hugging Face directories: what is read, and what is refused."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.errors import CheckpointError
from llama_decoder.tiny import random_weights, tiny_config, write_huggingface

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CONFIG = tiny_config(num_layers=1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-llama"
    path.mkdir()
    write_huggingface(CONFIG, path, seed=0)
    return path


def rewrite(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors."""
    tensors = {**load_file(directory / SINGLE), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / SINGLE)


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def split(directory: Path) -> dict[str, str]:
    """Turns the single file into two and an index, whose map is returned."""
    tensors = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    places = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        held = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(held, directory / file)
    write_index(directory, places)
    return places


def write_index(directory: Path, places: Any) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_weights(directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """The decoder's weights are those of seed 0, rounded to ``dtype``."""
    expected = random_weights(CONFIG, 0)
    read = dict(open_checkpoint(directory).weights())
    assert list(read) == list(expected)
    for name, value in read.items():
        rounded = torch.from_numpy(expected[name]).to(dtype).float()
        assert value.dtype == np.float32
        assert value.flags.writeable
        assert np.array_equal(value, rounded)


def test_a_single_file_is_read(directory: Path) -> None:
    assert_weights(directory)
    checkpoint = open_checkpoint(directory)
    assert checkpoint.config == CONFIG
    assert checkpoint.source_format == "safetensors"
    assert checkpoint.metadata == {}
    assert checkpoint.name == "tiny-llama"
    assert checkpoint.licence is None
    (directory / "LICENSE").write_text("text")
    (directory / "README.md").write_text("---\nlicense: mit\n---\n")
    assert open_checkpoint(directory).licence == "mit"
    assert checkpoint.licence_files() == [directory / "LICENSE"]


def test_an_index_is_read(directory: Path) -> None:
    split(directory)
    assert_weights(directory)
    assert {path.name for path in open_checkpoint(directory).files} == {
        "config.json",
        INDEX,
        "model-1-of-2.safetensors",
        "model-2-of-2.safetensors",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(directory: Path, dtype: torch.dtype) -> None:
    rewrite(directory, {k: v.to(dtype) for k, v in load_file(directory / SINGLE).items()})
    assert_weights(directory, dtype)


def test_writing_to_a_weight_leaves_the_file_alone(directory: Path) -> None:
    before = (directory / SINGLE).read_bytes()
    for _, value in open_checkpoint(directory).weights():
        value += 1
    assert (directory / SINGLE).read_bytes() == before


def test_types_may_differ_from_tensor_to_tensor(directory: Path) -> None:
    types = [torch.float32, torch.bfloat16, torch.float16]
    stored = load_file(directory / SINGLE)
    rewrite(directory, {name: v.to(types[i % 3]) for i, (name, v) in enumerate(stored.items())})
    expected = load_file(directory / SINGLE)
    read = dict(open_checkpoint(directory).weights())
    for name in (EMBEDDING, HEAD, "model.norm.weight"):
        assert np.array_equal(read[name], expected[name].float())
    layer = "model.layers.0.self_attn"
    qkv = torch.cat([expected[f"{layer}.{which}_proj.weight"].float() for which in "qkv"])
    assert np.array_equal(read[f"{layer}.qkv_proj.weight"], qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_data_may_begin_anywhere(directory: Path, dtype: torch.dtype) -> None:
    """Old writers don't fill the header up to a multiple of 8 bytes."""
    rewrite(directory, {k: v.to(dtype) for k, v in load_file(directory / SINGLE).items()})
    data = (directory / SINGLE).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" "
    (directory / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    assert_weights(directory, dtype)


def mapped_bytes(directory: Path) -> int:
    """Of the directory's files, in this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    places = [line.split()[0].split("-") for line in lines if str(directory) in line]
    return sum(int(end, 16) - int(start, 16) for start, end in places)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_mapped_only_where_a_tensor_is_used(directory: Path, dtype: torch.dtype) -> None:
    """Pages of a map count as resident: a build of any model would end with all of it."""
    rewrite(directory, {k: v.to(dtype) for k, v in load_file(directory / SINGLE).items()})
    split(directory)
    checkpoint = open_checkpoint(directory)
    assert not mapped_bytes(directory)
    most = 0
    for _, value in checkpoint.weights():
        mapped = mapped_bytes(directory)
        assert mapped < value.nbytes + 2 * mmap.PAGESIZE
        most = max(most, mapped)
        del value
    assert not mapped_bytes(directory)
    assert (most > 0) == (dtype == torch.float32)  # which is used as it lies in the file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), "has changed since"),
        (lambda path: os.truncate(path, path.stat().st_size + 1), "has changed since"),
        (lambda path: os.utime(path, ns=(0, path.stat().st_mtime_ns + 1)), "has changed since"),
        (Path.unlink, "can't be read: No such file"),
    ],
    ids=["cut short", "longer", "written to", "gone"],
)
def test_a_file_that_changes_while_it_is_read_is_named(
    directory: Path, change: Callable[[Path], object], said: str
) -> None:
    weights = open_checkpoint(directory).weights()
    next(weights)
    change(directory / SINGLE)
    with pytest.raises(CheckpointError, match=f"{SINGLE} {said}"):
        next(weights)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.float64, "F64"), (torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_other_element_types_are_refused_by_name(
    directory: Path, dtype: torch.dtype, said: str
) -> None:
    name = "model.norm.weight"
    rewrite(directory, {name: torch.ones(64).to(dtype)})
    assert f"'{name}' is {said}" in refusal(directory)


def test_faults_of_the_tensors_are_listed(directory: Path) -> None:
    layer = "model.layers.0.self_attn"
    rewrite(directory, {f"{layer}.q_proj.bias": torch.ones(128), "model.norm.weight": None})
    message = refusal(directory)
    assert str(directory) in message
    assert "1 missing (model.norm.weight)" in message
    assert f"1 unexpected ('{layer}.q_proj.bias')" in message


def test_stored_rotary_frequencies_are_harmless(directory: Path) -> None:
    rewrite(directory, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})
    assert_weights(directory)


def test_a_head_beside_tied_embeddings_must_be_the_embedding(directory: Path) -> None:
    configure(directory, tie_word_embeddings=True)
    assert "tie_word_embeddings" in refusal(directory)
    rewrite(directory, {HEAD: load_file(directory / SINGLE)[EMBEDDING].clone()})
    assert HEAD not in dict(open_checkpoint(directory).weights())


def test_the_index_and_its_files_must_agree(directory: Path) -> None:
    places = split(directory)
    moved = {**places, "model.norm.weight": "model-1-of-2.safetensors"}
    assert moved != places
    write_index(directory, moved)
    assert "model.norm.weight" in refusal(directory)
    write_index(directory, {k: v for k, v in places.items() if k != HEAD})
    assert HEAD in refusal(directory)
    write_index(directory, {**places, "model.extra.weight": "model-1-of-2.safetensors"})
    assert "model.extra.weight" in refusal(directory)


@pytest.mark.parametrize(
    "file",
    ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "model.bin", 7, None],
)
def test_an_index_names_only_safetensors_beside_it(directory: Path, file: object) -> None:
    write_index(directory, {**split(directory), HEAD: file})
    assert "beside it" in refusal(directory)


@pytest.mark.parametrize("places", [None, {}, [], "x"])
def test_an_index_needs_a_weight_map(directory: Path, places: object) -> None:
    split(directory)
    write_index(directory, places)
    assert "weight_map" in refusal(directory)


def test_a_file_of_the_index_that_is_missing_is_named(directory: Path) -> None:
    split(directory)
    (directory / "model-2-of-2.safetensors").unlink()
    assert "model-2-of-2.safetensors can't be read" in refusal(directory)


class Trap:
    """A pickle of it would create a file when opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "writer", ["torch", "torch legacy", *(f"pickle {protocol}" for protocol in range(6))]
)
@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.PT", SINGLE, "config.json", "model.gguf", "model.pth", "a.pickle"],
)
def test_pickles_are_never_opened(directory: Path, writer: str, name: str) -> None:
    sprung = directory / "sprung"
    if name != "config.json":
        (directory / SINGLE).unlink()
    path = directory / name
    if writer.startswith("torch"):
        torch.save(Trap(sprung), path, _use_new_zipfile_serialization=writer == "torch")
    else:
        path.write_bytes(pickle.dumps(Trap(sprung), protocol=int(writer[-1])))
    given = path if name == "model.gguf" else directory
    message = refusal(given)
    assert "pickle" in message
    assert "safetensors" in message
    assert not sprung.exists()
    if name.lower().endswith((".bin", ".pt", ".pth", ".pickle")):
        assert "is a pickle" in refusal(path)


def test_a_header_length_that_looks_like_a_pickle_is_none(directory: Path) -> None:
    data = (directory / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].ljust(0x0580)
    (directory / SINGLE).write_bytes(
        len(header).to_bytes(8, "little") + header + data[8 + length :]
    )
    assert (directory / SINGLE).read_bytes().startswith(b"\x80\x05")
    assert_weights(directory)


@pytest.mark.parametrize("name", ["config.json", SINGLE])
def test_a_git_lfs_pointer_is_called_so(directory: Path, name: str) -> None:
    (directory / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "git lfs pull" in refusal(directory)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"garbage garbage", b"\xff" * 64])
def test_a_damaged_weights_file_is_named(directory: Path, content: bytes) -> None:
    (directory / SINGLE).write_bytes(content)
    assert f"{SINGLE} is not a whole safetensors file" in refusal(directory)


def test_a_truncated_weights_file_is_named(directory: Path) -> None:
    data = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(data[:-1])
    assert f"{SINGLE} is not a whole safetensors file" in refusal(directory)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_a_damaged_config_is_named(directory: Path, content: bytes) -> None:
    (directory / "config.json").write_bytes(content)
    assert "config.json" in refusal(directory)


def test_a_refused_config_says_which_checkpoint(directory: Path) -> None:
    configure(directory, model_type="gpt2")
    message = refusal(directory)
    assert str(directory) in message
    assert "'gpt2'" in message


def test_what_is_missing_is_said(directory: Path, tmp_path: Path) -> None:
    assert "check the path" in refusal(tmp_path / "nowhere")
    assert "give the directory" in refusal(directory / SINGLE)
    (directory / SINGLE).unlink()
    assert f"neither {SINGLE} nor {INDEX}" in refusal(directory)
    (directory / "config.json").unlink()
    assert "no config.json" in refusal(directory)


def test_source_files_are_hashed(directory: Path) -> None:
    hashes = open_checkpoint(directory).sha256()
    assert hashes == {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in ("config.json", SINGLE)
    }


def test_a_snapshot_in_the_cache_of_hugging_face_has_the_name_of_its_repository(
    tmp_path: Path,
) -> None:
    snapshot = tmp_path / "models--org--tiny-llama" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    write_huggingface(CONFIG, snapshot, seed=0)
    assert open_checkpoint(snapshot).name == "org/tiny-llama"
