"""What a Llama is, in numbers: the configuration every other module takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llama_decoder import config_gguf, config_huggingface
from llama_decoder.errors import CheckpointError
from llama_decoder.fields import quoted
from llama_runtime.contract import Geometry

# Beyond every Llama there is, and small enough that no table made from them exhausts memory.
MAX_VOCABULARY = 4_194_304
MAX_HIDDEN = 65_536
MAX_INTERMEDIATE = 524_288
MAX_LAYERS = 1_024
MAX_HEADS = 1_024
MAX_HEAD_DIM = 512
MAX_POSITIONS = 4_194_304
MAX_THETA = 1e12
MAX_FACTOR = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for sequences longer than those of pretraining.

    Attributes:
        kind: ``linear`` divides every frequency by ``factor``; ``llama3`` only the low ones, with
            a smooth passage between the two bounds.
        factor: the divisor, at least 1.
        low_freq_factor: only ``llama3``: frequencies whose wavelength is over
            ``original_max_positions / low_freq_factor`` tokens are divided.
        high_freq_factor: only ``llama3``: those with a wavelength under
            ``original_max_positions / high_freq_factor`` tokens stay.
        original_max_positions: only ``llama3``: longest sequence of pretraining, in tokens.

    Raises:
        CheckpointError: a value is out of range, or doesn't belong to the kind.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_positions: int | None = None

    def __post_init__(self) -> None:
        _check_real("RoPE scaling factor", self.factor, 1.0, MAX_FACTOR)
        bounds = (self.low_freq_factor, self.high_freq_factor, self.original_max_positions)
        if self.kind == "linear":
            if bounds != (None, None, None):
                raise CheckpointError("linear RoPE scaling takes a factor and nothing else")
            return
        low, high, positions = bounds
        if low is None or high is None or positions is None:
            raise CheckpointError(
                "llama3 RoPE scaling needs low_freq_factor, high_freq_factor and "
                "original_max_position_embeddings"
            )
        _check_real("low_freq_factor", low, 1.0 / MAX_FACTOR, MAX_FACTOR)
        _check_real("high_freq_factor", high, 1.0 / MAX_FACTOR, MAX_FACTOR)
        _check_whole("original_max_position_embeddings", positions, MAX_POSITIONS)
        if high <= low:
            raise CheckpointError(
                f"high_freq_factor is {high}; it must be above low_freq_factor, {low}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The shape and the constants of one Llama decoder.

    Attributes:
        vocab_size: V.
        hidden_size: E.
        intermediate_size: I, width of the gated MLP.
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: K, key and value heads; divides H.
        head_dim: D, even; need not be E / H.
        rms_norm_eps: added to the mean square in every RMS norm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the frequencies are stretched, if they are.
        rope_factors: D/2 divisors of the frequencies, as GGUF's ``rope_freqs.weight`` holds them.
        max_positions: the longest sequence the model was made for, in tokens.
        tie_embeddings: the output matrix is the embedding matrix.

    Raises:
        CheckpointError: a value is out of range, or two don't fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_factors: tuple[float, ...] | None
    max_positions: int
    tie_embeddings: bool

    def __post_init__(self) -> None:
        _check_whole("vocab_size", self.vocab_size, MAX_VOCABULARY)
        _check_whole("hidden_size", self.hidden_size, MAX_HIDDEN)
        _check_whole("intermediate_size", self.intermediate_size, MAX_INTERMEDIATE)
        _check_whole("num_layers", self.num_layers, MAX_LAYERS)
        _check_whole("num_heads", self.num_heads, MAX_HEADS)
        _check_whole("num_kv_heads", self.num_kv_heads, MAX_HEADS)
        _check_whole("head_dim", self.head_dim, MAX_HEAD_DIM)
        _check_whole("max_positions", self.max_positions, MAX_POSITIONS)
        _check_real("rms_norm_eps", self.rms_norm_eps, 1e-12, 0.1)
        _check_real("rope_theta", self.rope_theta, 1.0, MAX_THETA)
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads is {self.num_heads}; it must be a multiple of num_kv_heads, "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}; it must be even, for RoPE")
        self._check_rope_factors()

    def _check_rope_factors(self) -> None:
        if self.rope_factors is None:
            return
        if len(self.rope_factors) != self.head_dim // 2:
            raise CheckpointError(
                f"rope_factors has {len(self.rope_factors)} values; head_dim {self.head_dim} "
                f"needs {self.head_dim // 2}"
            )
        for factor in self.rope_factors:
            _check_real("a value of rope_factors", factor, 1.0 / MAX_FACTOR, MAX_FACTOR)
        if self.rope_scaling is not None and self.rope_scaling.kind == "llama3":
            raise CheckpointError("rope_factors already are llama3 scaling; give one of the two")

    @property
    def geometry(self) -> Geometry:
        """The numbers that a backend and a memory plan need."""
        return Geometry(
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
        )

    @classmethod
    def from_huggingface(cls, config: Mapping[str, object]) -> LlamaConfig:
        """Reads what a Hugging Face ``config.json`` says.

        What it leaves out has the default of transformers' ``LlamaConfig``.

        Args:
            config: the parsed file.

        Raises:
            CheckpointError: it isn't a Llama, asks for something unsupported, or is out of range.
        """
        values, scaling = config_huggingface.read(config)
        return cls(
            **values,
            rope_scaling=None if scaling is None else RopeScaling(**scaling),
            rope_factors=None,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, object],
        *,
        rope_factors: Sequence[float] | None,
        tie_embeddings: bool,
    ) -> LlamaConfig:
        """Reads what the metadata of a GGUF file says.

        Args:
            metadata: key to value, as plain Python values.
            rope_factors: the values of ``rope_freqs.weight``, if the file has that tensor.
            tie_embeddings: the file has no ``output.weight``.

        Raises:
            CheckpointError: it isn't a Llama, asks for something unsupported, or is out of range.
        """
        values, scaling = config_gguf.read(metadata)
        return cls(
            **values,
            rope_scaling=None if scaling is None else RopeScaling(**scaling),
            rope_factors=None if rope_factors is None else tuple(rope_factors),
            tie_embeddings=tie_embeddings,
        )


def _check_whole(name: str, value: object, limit: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise CheckpointError(f"{name} is {quoted(value)}; it must be 1 to {limit}")


def _check_real(name: str, value: object, low: float, high: float) -> None:
    if not (isinstance(value, float) and math.isfinite(value) and low <= value <= high):
        raise CheckpointError(f"{name} is {quoted(value)}; it must be a float, {low:g} to {high:g}")
