"""Configurations: what published models say, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llama_decoder.config import LlamaConfig, RopeScaling
from llama_decoder.errors import CheckpointError
from llama_decoder.shapes import SHAPES
from llama_decoder.tiny import tiny_config, write_huggingface

# The config.json of each, as published, less what no Llama reads.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "published_configs.json").read_text()
)
LLAMA3_SCALING: dict[str, Any] = PUBLISHED["Llama-3.1-8B"]["rope_scaling"]
SMALLEST: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.vocab_size": 49152,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
}


def from_gguf(**changes: Any) -> LlamaConfig:
    metadata = {**GGUF, **{f"llama.{key}": value for key, value in changes.items()}}
    return LlamaConfig.from_gguf(metadata, rope_factors=None, tie_embeddings=True)


@pytest.mark.parametrize("name", SHAPES)
def test_published_configs_are_the_named_shapes(name: str) -> None:
    assert LlamaConfig.from_huggingface(PUBLISHED[name]) == SHAPES[name]


@pytest.mark.parametrize("name", SHAPES)
def test_the_newer_spelling_of_rope_means_the_same(name: str) -> None:
    config = dict(PUBLISHED[name])
    theta = config.pop("rope_theta", 10000.0)
    rope = config.pop("rope_scaling") or {"rope_type": "default"}
    config["rope_parameters"] = {**rope, "rope_theta": theta}
    assert LlamaConfig.from_huggingface(config) == SHAPES[name]


def test_the_older_key_type_means_rope_type() -> None:
    config = {**SMALLEST, "rope_scaling": {"type": "linear", "factor": 2}}
    scaling = LlamaConfig.from_huggingface(config).rope_scaling
    assert scaling == RopeScaling(kind="linear", factor=2.0)


def test_what_is_left_out_has_the_defaults_of_transformers() -> None:
    ours = LlamaConfig.from_huggingface(SMALLEST)
    theirs = transformers.LlamaConfig(**SMALLEST)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == theirs.head_dim
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.max_positions == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert theirs.rope_parameters["rope_type"] == "default"
    assert ours.rope_scaling is None


def test_llama3_scaling_without_an_original_length_takes_the_longest_as_transformers_does() -> None:
    rope = {k: v for k, v in LLAMA3_SCALING.items() if k != "original_max_position_embeddings"}
    scaling = LlamaConfig.from_huggingface({**SMALLEST, "rope_scaling": rope}).rope_scaling
    assert scaling is not None
    assert scaling.original_max_positions == 2048


@pytest.mark.parametrize("name", SHAPES)
def test_what_transformers_saves_is_read(name: str, tmp_path: Path) -> None:
    transformers.LlamaConfig(**PUBLISHED[name]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert LlamaConfig.from_huggingface(saved) == SHAPES[name]


def test_an_explicit_head_dim_is_kept() -> None:
    config = LlamaConfig.from_huggingface({**SMALLEST, "head_dim": 80})
    assert config.head_dim == 80
    assert config.geometry.head_dim == 80


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(tie_embeddings=True),
        tiny_config(rope_scaling=RopeScaling(kind="linear", factor=4.0)),
        tiny_config(
            rope_scaling=RopeScaling(
                kind="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=64,
            )
        ),
    ],
)
def test_a_written_config_reads_back(config: LlamaConfig, tmp_path: Path) -> None:
    write_huggingface(config, tmp_path, seed=0)
    written = json.loads((tmp_path / "config.json").read_text())
    assert LlamaConfig.from_huggingface(written) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mistral"}, "model_type in config.json is 'mistral'"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "gelu"}, "hidden_act in config.json is 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "gptq"}}, "method 'gptq'"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "twice"),
        ({"rope_scaling": {"type": "linear"}}, "no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}}, "beta_fast"),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 7.0}, "rope_theta"),
        (
            {
                "rope_parameters": {"rope_theta": 1e4},
                "rope_scaling": {"type": "linear", "factor": 2},
            },
            "contradict",
        ),
        ({"vocab_size": None}, "no vocab_size"),
        ({"vocab_size": "512"}, "a whole number"),
        ({"hidden_size": True}, "a whole number"),
        ({"hidden_size": 1_000_000_000}, "hidden_size is 1000000000; it must be 1 to 65536"),
        ({"hidden_size": 66}, "no multiple of the number of heads"),
        ({"num_attention_heads": 0}, "heads"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_key_value_heads": 0}, "num_kv_heads"),
        ({"num_hidden_layers": 10**9}, "num_layers"),
        ({"head_dim": 33}, "even"),
        ({"head_dim": 0}, "head_dim"),
        ({"max_position_embeddings": 10**12}, "max_positions"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_huggingface_configs_are_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        LlamaConfig.from_huggingface({**SMALLEST, **changes})
    assert said in str(refusal.value)


def test_gguf_metadata_of_smollm2_is_its_shape() -> None:
    assert from_gguf() == SHAPES["SmolLM2-135M"]


def test_a_gguf_without_a_vocabulary_size_has_as_many_as_tokens() -> None:
    metadata = {k: v for k, v in GGUF.items() if k != "llama.vocab_size"}
    metadata["tokenizer.ggml.tokens"] = ["a", "b", "c"]
    config = LlamaConfig.from_gguf(metadata, rope_factors=None, tie_embeddings=False)
    assert config.vocab_size == 3
    assert not config.tie_embeddings


def test_a_gguf_head_dimension_may_be_explicit() -> None:
    changes = {"attention.key_length": 80, "attention.value_length": 80, "rope.dimension_count": 80}
    assert from_gguf(**changes).head_dim == 80


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 0.0}, None),
    ],
)
def test_gguf_scaling_is_what_llama_cpp_takes_it_for(
    changes: dict[str, Any], scaling: float | None
) -> None:
    expected = None if scaling is None else RopeScaling(kind="linear", factor=scaling)
    assert from_gguf(**changes).rope_scaling == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"general.architecture": "qwen2"}, "'qwen2'"),
        ({"llama.expert_count": 8}, "experts"),
        ({"split.count": 3}, "llama-gguf-split"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.attention.head_count": [9, 9]}, "a whole number"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon"),
        ({"llama.context_length": None}, "llama.context_length"),
        ({"llama.vocab_size": 2**40}, "vocab_size"),
    ],
)
def test_gguf_metadata_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        LlamaConfig.from_gguf({**GGUF, **changes}, rope_factors=None, tie_embeddings=True)
    assert said in str(refusal.value)


@pytest.mark.parametrize("factors", [(1.0,) * 15, (0.0,) * 16, (math.nan,) * 16, (-1.0,) * 16])
def test_rope_factors_must_fit(factors: tuple[float, ...]) -> None:
    with pytest.raises(CheckpointError, match="rope_factors"):
        tiny_config(rope_factors=factors)


def test_rope_factors_and_llama3_scaling_exclude_each_other() -> None:
    scaling = SHAPES["Llama-3.1-8B"].rope_scaling
    with pytest.raises(CheckpointError, match="one of the two"):
        tiny_config(rope_factors=(1.0,) * 16, rope_scaling=scaling)


def test_linear_scaling_takes_a_factor_only() -> None:
    with pytest.raises(CheckpointError, match="nothing else"):
        RopeScaling(kind="linear", factor=2.0, low_freq_factor=1.0)


def test_geometry_has_the_same_numbers() -> None:
    config = tiny_config()
    for name in config.geometry.__slots__:
        assert getattr(config.geometry, name) == getattr(config, name)


TEXT = st.text("ab'\n", max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
ROPE = st.dictionaries(st.sampled_from([*LLAMA3_SCALING, "type", "rope_theta"]), JSON, max_size=4)


@given(
    st.dictionaries(
        st.sampled_from([*PUBLISHED["Llama-3.2-1B"], "quantization_config", "auto_map"]),
        JSON,
        max_size=3,
    ),
    ROPE,
)
def test_any_config_is_read_or_refused(changes: dict[str, Any], rope: dict[str, Any]) -> None:
    config = {**PUBLISHED["Llama-3.2-1B"], "rope_parameters": rope, **changes}
    try:
        LlamaConfig.from_huggingface(config)
    except CheckpointError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017


@given(st.dictionaries(st.sampled_from([*GGUF, "llama.rope.scaling.factor"]), JSON, max_size=3))
def test_any_gguf_metadata_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        LlamaConfig.from_gguf({**GGUF, **changes}, rope_factors=None, tie_embeddings=True)
    except CheckpointError as refusal:
        assert "\n" not in str(refusal)  # noqa: PT017
