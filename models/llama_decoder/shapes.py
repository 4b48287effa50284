"""Published Llamas by name: their configurations, without weights, for tests and benchmarks.

From each model's ``config.json`` on Hugging Face.
"""

from __future__ import annotations

from llama_decoder.config import LlamaConfig, RopeScaling

SMOLLM2_135M = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100_000.0,
    rope_scaling=None,
    rope_factors=None,
    max_positions=8_192,
    tie_embeddings=True,
)


def _llama3_scaling(factor: float) -> RopeScaling:
    """What Llama 3.1 and 3.2 share: pretrained on 8,192 positions, then stretched."""
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8_192,
    )


TINYLLAMA_1_1B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2_048,
    intermediate_size=5_632,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    rope_factors=None,
    max_positions=2_048,
    tie_embeddings=False,
)
LLAMA_3_2_1B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=2_048,
    intermediate_size=8_192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=_llama3_scaling(32.0),
    rope_factors=None,
    max_positions=131_072,
    tie_embeddings=True,
)
LLAMA_3_2_3B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=3_072,
    intermediate_size=8_192,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=_llama3_scaling(32.0),
    rope_factors=None,
    max_positions=131_072,
    tie_embeddings=True,
)
LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4_096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    rope_scaling=_llama3_scaling(8.0),
    rope_factors=None,
    max_positions=131_072,
    tie_embeddings=False,
)
LLAMA_2_7B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4_096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    rope_factors=None,
    max_positions=4_096,
    tie_embeddings=False,
)

SHAPES = {
    "SmolLM2-135M": SMOLLM2_135M,
    "TinyLlama-1.1B": TINYLLAMA_1_1B,
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "Llama-3.2-3B": LLAMA_3_2_3B,
    "Llama-3.1-8B": LLAMA_3_1_8B,
    "Llama-2-7B": LLAMA_2_7B,
}
