"""Names, shapes and strictness of the decoder's parameters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llama_decoder import names
from llama_decoder.checkpoint import open_checkpoint
from llama_decoder.config import LlamaConfig
from llama_decoder.errors import CheckpointError
from llama_decoder.shapes import SHAPES
from llama_decoder.tiny import random_weights, tiny_config, write_huggingface
from llama_decoder.weights import check_tensors, parameter_shapes, parameters, separate


def shapes_in_checkpoint(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    expected = parameters(config, "safetensors")
    return {part.name: part.shape for parameter in expected for part in parameter.parts}


def test_parameters_come_in_the_order_of_the_decoder() -> None:
    assert parameter_shapes(tiny_config(num_layers=1)) == {
        "model.embed_tokens.weight": (512, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.self_attn.qkv_proj.weight": (4 * 32 + 2 * 2 * 32, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 4 * 32),
        "model.layers.0.post_attention_layernorm.weight": (64,),
        "model.layers.0.mlp.gate_proj.weight": (128, 64),
        "model.layers.0.mlp.up_proj.weight": (128, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 128),
        "model.norm.weight": (64,),
        "lm_head.weight": (512, 64),
    }
    assert list(parameter_shapes(tiny_config()))[-1] == "lm_head.weight"
    assert list(parameter_shapes(tiny_config(tie_embeddings=True)))[-1] == "model.norm.weight"


@pytest.mark.parametrize(
    ("name", "count"), [("SmolLM2-135M", 134_515_008), ("Llama-3.1-8B", 8_030_261_248)]
)
def test_published_models_have_their_published_number_of_weights(name: str, count: int) -> None:
    shapes = parameter_shapes(SHAPES[name]).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == count


def test_every_row_of_the_name_table_has_a_reason() -> None:
    rows = names.FIRST + names.LAYER + names.LAST + names.UNTIED
    assert all(row.reason for row in rows)
    for row in rows:
        fused = len(row.parts) > 1
        assert fused == row.reason.startswith("fused")
        assert fused or row.name == row.parts[0].huggingface


@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_are_those_of_transformers(tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tie_embeddings=tied)
    write_huggingface(config, tmp_path, seed=3)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    if tied:
        assert theirs.pop("lm_head.weight") is not None
    assert {name: tuple(t.shape) for name, t in theirs.items()} == shapes_in_checkpoint(config)
    ours = dict(open_checkpoint(tmp_path).weights())
    layer = "model.layers.1."
    qkv = torch.cat([theirs[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"])
    assert np.array_equal(ours[f"{layer}self_attn.qkv_proj.weight"], qkv)
    for name in ours.keys() & theirs.keys():
        assert np.array_equal(ours[name], theirs[name])


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    first, again = random_weights(tiny_config(), 1), random_weights(tiny_config(), 1)
    other = random_weights(tiny_config(), 2)
    assert list(first) == list(parameter_shapes(tiny_config()))
    for name, value in first.items():
        assert value.dtype == np.float32
        assert np.array_equal(value, again[name])
        assert not np.array_equal(value, other[name])


def test_faults_are_listed_all_at_once() -> None:
    shapes = shapes_in_checkpoint(tiny_config())
    del shapes["model.norm.weight"]
    del shapes["model.layers.1.self_attn.k_proj.weight"]
    shapes["model.layers.0.self_attn.q_proj.bias"] = (128,)
    shapes["model.layers.0.mlp.up_proj.weight"] = (64, 128)
    with pytest.raises(CheckpointError) as refusal:
        check_tensors(parameters(tiny_config(), "safetensors"), shapes, harmless=set())
    message = str(refusal.value)
    assert "2 missing (model.layers.1.self_attn.k_proj.weight, model.norm.weight)" in message
    assert "1 unexpected ('model.layers.0.self_attn.q_proj.bias')" in message
    assert "model.layers.0.mlp.up_proj.weight is [64, 128] and must be [128, 64]" in message


def test_a_long_list_of_faults_is_cut() -> None:
    config = tiny_config(num_layers=1000)
    with pytest.raises(CheckpointError, match=r"9003 missing .* and 8995 more") as refusal:
        check_tensors(parameters(config, "safetensors"), {}, harmless=set())
    assert len(str(refusal.value)) < 1000


def test_a_missing_head_is_missing_only_where_it_is_not_tied() -> None:
    shapes = shapes_in_checkpoint(tiny_config(tie_embeddings=True))
    check_tensors(
        parameters(tiny_config(tie_embeddings=True), "safetensors"), shapes, harmless=set()
    )
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head.weight\)"):
        check_tensors(parameters(tiny_config(), "safetensors"), shapes, harmless=set())


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 8), (4, 32)])
def test_separating_rows_undoes_the_permutation_of_llama_cpp(num_heads: int, head_dim: int) -> None:
    rows = np.arange(num_heads * head_dim * 3, dtype=np.float32).reshape(-1, 3)
    permuted = permute(rows, num_heads)
    assert np.array_equal(separate(permuted, num_heads), rows)
    if head_dim > 2:
        assert not np.array_equal(permuted, rows)


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """As ``LlamaModel.permute`` of llama.cpp's ``convert_hf_to_gguf.py`` has it."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )
