"""Made-up weights: the same bytes anywhere, a tokenizer for them, and nothing false said."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from llama_decoder import shapes
from llama_decoder.shapes import SHAPES
from llama_decoder.tiny import tiny_config
from llama_decoder.weights import parameter_shapes
from llama_export import precision
from llama_export.build import build_bundle
from llama_export.bundle_checks import verify_bundle
from llama_export.errors import ExportError
from llama_export.precision import PRODUCTS, in_file_order
from llama_export.precisions import CPU_PRECISIONS, CUDA_PRECISIONS
from llama_export.random_weights import random_blocks, random_parameters, random_tokenizer
from llama_export.sources import open_source
from llama_runtime.bundle import open_bundle
from llama_runtime.prompt_encoder import PromptEncoder

CONFIG = tiny_config(num_layers=2)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "BLOCK_ELEMENTS", 1000)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(shapes.SHAPES, "Tiny", CONFIG)
    return "Tiny"


def values(seed: int, num_threads: int) -> dict[str, np.ndarray]:
    blocks: dict[str, list[np.ndarray]] = {}
    for name, rows in random_blocks(CONFIG, seed, lambda _, rows: rows, num_threads):
        blocks.setdefault(name, []).append(rows)
    return {name: np.concatenate(parts) for name, parts in blocks.items()}


@pytest.mark.usefixtures("small_blocks")
def test_bytes_depend_on_the_seed_and_on_no_number_of_threads() -> None:
    alone, company, other = values(7, 1), values(7, 5), values(8, 5)
    assert {name: value.shape for name, value in alone.items()} == parameter_shapes(CONFIG)
    for name, whole in random_parameters(CONFIG, 7):
        assert alone[name].tobytes() == company[name].tobytes() == whole.tobytes()
        assert not np.array_equal(alone[name], other[name])


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["fp16", "bf16"])
@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_stored_in_blocks_they_are_the_same_as_whole(name: str, num_threads: int) -> None:
    recipe = (CPU_PRECISIONS | CUDA_PRECISIONS)[name]
    stored: dict[str, list[np.ndarray]] = {}
    blocks = random_blocks(CONFIG, 7, recipe.encode, num_threads)
    for parameter, piece in in_file_order(recipe, blocks):
        stored.setdefault(parameter, []).append(piece)
    for parameter, whole in random_parameters(CONFIG, 7):
        assert whole.ndim == 1 or len(stored[parameter]) > 3
        cast = torch.from_numpy(whole).to(getattr(torch, recipe.activations))
        turned = cast.t().contiguous() if parameter.endswith(PRODUCTS) else cast
        expected = turned.view(torch.int16).numpy()
        np.testing.assert_array_equal(np.concatenate(stored[parameter]).view(np.int16), expected)


@pytest.mark.usefixtures("small_blocks")
def test_no_two_blocks_are_the_same_numbers() -> None:
    blocks = [rows for _, rows in random_blocks(CONFIG, 0, lambda _, rows: rows)]
    assert len(blocks) > 100
    assert len({rows.ravel()[:8].tobytes() for rows in blocks}) == len(blocks)


def test_activations_keep_their_size() -> None:
    for name, value in random_parameters(CONFIG, 0):
        if value.ndim == 1:
            assert abs(value.mean() - 1) < 0.05, name
            assert abs(value.std() - 0.1) < 0.03, name
        else:
            assert abs(value.std() * np.sqrt(value.shape[1]) - 1) < 0.05, name
        assert value.dtype == np.float32


@pytest.mark.usefixtures("small_blocks")
def test_few_blocks_are_made_ahead() -> None:
    made, lock = 0, threading.Lock()

    def count(*_: object) -> None:
        nonlocal made
        with lock:
            made += 1

    blocks = random_blocks(CONFIG, 0, count, num_threads=2)
    for given in range(1, 20):
        next(blocks)
        assert made <= given + 4
    blocks.close()  # type: ignore[attr-defined]  # a generator, which ends its threads
    assert not [t for t in threading.enumerate() if t.name.startswith("random-weights")]


def test_the_tokenizer_knows_every_id_and_no_more(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = random_tokenizer(1000)
    library = Tokenizer.from_buffer(tokenizer.tokenizer_json)
    assert library.get_vocab_size() == 1000
    text = "Ein Lama, 日本 \x00\n <|filler_300|>"
    ids = library.encode(text).ids
    assert max(ids) < 256
    assert library.decode(ids) == text
    assert library.decode([300, 998]) == "<|filler_300|><|filler_998|>"
    assert library.decode([999], skip_special_tokens=False) == "<|end|>"
    assert tokenizer.generation_config == {"eos_token_id": [999]}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_bundle_of_random_weights_says_so(target: str, tiny_shape: str, tmp_path: Path) -> None:
    manifest = build_bundle(tiny_shape, tmp_path / "b", target=target, random_seed=3)
    bundle = open_bundle(tmp_path / "b", verify="full")
    assert (manifest.source.format, manifest.source.file) == ("random", "Tiny")
    assert manifest.source.sha256 != open_source(tiny_shape, 4).record().sha256
    assert "random weights, seed 3" in manifest.name
    assert "random numbers" in (tmp_path / "b" / "README.md").read_text()
    assert PromptEncoder(bundle).encode("llama")
    assert bundle.chat_template is None
    if target == "cpu":
        assert manifest.verification["rows"] == 55
        stored = load_file(tmp_path / "b" / "model.safetensors")
        for name, value in random_parameters(CONFIG, 3):
            np.testing.assert_array_equal(stored[name], value)
    else:
        assert manifest.verification == {}
        assert "was not run" in (tmp_path / "b" / "README.md").read_text()
    assert verify_bundle(tmp_path / "b", tiny_shape, random_seed=3).passed
    with pytest.raises(ExportError, match="was built from Tiny"):
        verify_bundle(tmp_path / "b", tiny_shape, random_seed=4)


def test_an_unknown_shape_lists_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"no shape 'GPT-2'.*{', '.join(SHAPES)}"):
        build_bundle("GPT-2", tmp_path / "b", random_seed=0)
    with pytest.raises(ExportError, match="the seed is -1"):
        build_bundle("Llama-3.2-1B", tmp_path / "b", random_seed=-1)
    assert not list(tmp_path.iterdir())
