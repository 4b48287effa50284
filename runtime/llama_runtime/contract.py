"""The step contract: the names, types and axes that an exported graph and a backend agree on.

Export builds graphs from these tables and the backends bind from them, so a name is written once.
Standard library only: the decoder imports it too.

Axis letters mean the same everywhere in the project:

    B slots in it     N packed tokens     S widest chunk of the step    R rows that need logits
    K KV heads        H query heads       D head dimension              E hidden size
    V vocabulary      C cache capacity    L layers
    M blocks of the cache                 G tokens of a block           P columns of a block table

Every forward takes packed tokens: the new tokens of the sequences in it, back to back and without
padding. Only attention sees slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

DType = Literal[
    "float32", "float64", "float16", "bfloat16", "float8e4m3fn", "int64", "int32", "int8", "bool"
]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a graph.

    Attributes:
        name: the tensor's name in the graph.
        dtype: element type.
        axes: one letter an axis, from the legend of this module; empty for a scalar.
        meaning: one line for the documentation, which a test compares with this table.
    """

    name: str
    dtype: DType
    axes: tuple[str, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class Geometry:
    """The numbers of a model that a backend and a memory plan need.

    Attributes:
        num_layers: L.
        num_heads: H, query heads.
        num_kv_heads: K, key and value heads.
        head_dim: D.
        hidden_size: E.
        intermediate_size: width of the gated MLP.
        vocab_size: V.
        max_positions: the longest sequence the model was made for, in tokens.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_positions: int


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way of spelling attention and the cache.

    Attributes:
        name: as the manifest records it.
        inputs: the inputs before the cache, in graph order.
        cache_axes: axes of every key and value tensor.
        cache_dtype: their element type.
        logits_dtype: element type of the logits, which is that of the activations.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    cache_axes: tuple[str, ...]
    cache_dtype: DType
    logits_dtype: DType

    @property
    def logits(self) -> TensorSpec:
        """The first output."""
        return TensorSpec(LOGITS, self.logits_dtype, ("R", "V"), "scores of the next token")

    def typed(self, dtype: DType, cache: DType | None = None) -> Dialect:
        """The same with another type of activations, and of keys and values if it is their own."""
        return replace(self, cache_dtype=cache or dtype, logits_dtype=dtype)

    def cache_inputs(self, num_layers: int) -> tuple[TensorSpec, ...]:
        """Key then value of every layer, as they enter the graph."""
        return self._cache("past_key_values", "before this step", num_layers)

    def cache_outputs(self, num_layers: int) -> tuple[TensorSpec, ...]:
        """Key then value of every layer, bound to the same buffers as the inputs."""
        return self._cache("present", "after this step", num_layers)

    def _cache(self, prefix: str, when: str, num_layers: int) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{prefix}.{i}.{part}", self.cache_dtype, self.cache_axes, f"{part}s {when}")
            for i in range(num_layers)
            for part in ("key", "value")
        )


LOGITS = "logits"

SLOTS = Dialect(
    name="slots",
    inputs=(
        TensorSpec("input_ids", "int64", ("N",), "packed new tokens"),
        TensorSpec("logits_rows", "int64", ("R",), "packed rows that need logits"),
        TensorSpec("unpack", "int64", ("B", "S"), "packed row of each cell of the step"),
        TensorSpec("pack", "int64", ("N",), "cell, row by row, of each token"),
        TensorSpec(
            "seqlens_k", "int32", ("B",), "cached tokens after this step, less 1; 0 if inactive"
        ),
        TensorSpec("query_seqlens", "int32", ("B",), "new tokens of each slot; 0 if inactive"),
        TensorSpec(
            "total_sequence_length",
            "int32",
            (),
            "the largest count of cached tokens after this step, and S at least",
        ),
    ),
    cache_axes=("B", "K", "C", "D"),
    cache_dtype="float32",
    logits_dtype="float32",
)

PAGED = Dialect(
    name="paged",
    inputs=(
        TensorSpec("input_ids", "int64", ("N",), "packed new tokens"),
        TensorSpec("logits_rows", "int64", ("R",), "packed rows that need logits"),
        TensorSpec(
            "cumulative_sequence_length",
            "int32",
            ("B+1",),
            "packed row at which each sequence's new tokens begin, and their end",
        ),
        TensorSpec("past_seqlens", "int32", ("B",), "cached tokens before this step"),
        TensorSpec("block_table", "int32", ("B", "P"), "blocks of each sequence, in order"),
        TensorSpec(
            "slot_mapping", "int32", ("N",), "cell of the cache that each token goes to; -1: none"
        ),
        TensorSpec(
            "attention_metadata",
            "int32",
            ("3",),
            "in CPU memory: no sequence has more new tokens, more in all, or fewer in all",
        ),
    ),
    cache_axes=("M", "G", "K", "D"),
    cache_dtype="float16",
    logits_dtype="float16",
)

TENSORRT = Dialect(
    name="tensorrt",
    inputs=(
        TensorSpec("input_ids", "int64", ("N",), "packed new tokens"),
        TensorSpec("logits_rows", "int64", ("R",), "packed rows that need logits"),
        TensorSpec("unpack", "int64", ("B", "S"), "packed row of each cell of the step"),
        TensorSpec("pack", "int64", ("N",), "cell, row by row, of each token"),
        TensorSpec(
            "past_lengths", "int64", ("B",), "cached tokens before this step; past + S is at most C"
        ),
    ),
    cache_axes=("B", "K", "C", "D"),
    cache_dtype="float16",
    logits_dtype="float16",
)

# Bytes of one number of a key or a value.
CACHE_ITEM_BYTES: dict[DType, int] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8e4m3fn": 1,
    "int8": 1,
}

DIALECTS = {dialect.name: dialect for dialect in (SLOTS, PAGED, TENSORRT)}

# The rules that make a sequence's logits the same bits in any company on ONNX Runtime's CPU
# kernels (docs/architecture.md gives the reason of each, tests/laws breaks each once).
CHUNK_MULTIPLE = 32  # prompt chunks end at multiples of it, but for the last
MAX_ROW_MULTIPLE = 4  # N and R are padded to multiples of 1, 2 or 4, as the kernels need
MIN_CHUNK = CHUNK_MULTIPLE + 1  # the longest last chunk, which is never split
MAX_CHUNK = 512  # the RoPE table reaches this far past the model's longest sequence

PROMPT_CHUNK = 128  # the most prompt tokens of one sequence in a step: longer ones stall streams
MAX_CELLS = 1024  # the most cells of a step of prompts, [B, S], which attention holds at once
MAX_DRAFT = 8  # the most tokens that are guessed of one sequence and verified in one step
MAX_VERIFIED = 128  # the most rows of logits of a step that verifies, unless there are more slots


def last_chunk_start(num_prompt_tokens: int) -> int:
    """First prompt position of the last chunk, which no schedule may split or merge.

    It leaves 2 to 33 tokens to the last chunk (1 if the prompt has one token), so the row whose
    logits are sampled always runs in a query tile of the same shape, alone or in company.
    """
    return CHUNK_MULTIPLE * max(0, (num_prompt_tokens - 2) // CHUNK_MULTIPLE)


def cache_capacity(max_len: int, max_chunk: int) -> int:
    """C for sequences of up to ``max_len`` tokens when chunks are up to ``max_chunk`` wide.

    A chunk is padded to the widest of its step, and the padded cells too must lie in the buffer;
    the furthest begin at a last chunk, or at the last but one token where a step verifies.
    """
    verified = max_len - 2 + 1 + MAX_DRAFT
    return max(verified, last_chunk_start(max_len - 1) + min(max_chunk, max_len - 1))


def max_logits_rows(num_slots: int) -> int:
    """The most rows of logits of one step: one a slot, or those of a step that verifies.

    That is more than a last chunk has, all of whose rows may be scored.
    """
    return max(num_slots, MAX_VERIFIED)


# The sampler: a graph of its own, fed with rows of the decoder's logits where they lie. Rows come
# in three groups, whose sizes are U, F and L: drawn from the whole vocabulary, drawn from filtered
# tokens, and scored. Greedy rows need no graph. T is 20, or V if that is less.
SAMPLER = "sampler"  # the name of its dialect in a manifest
MAX_TOP_LOGPROBS = 20
SAMPLER_ROWS = 32  # that go through it at once: each holds two or three times its logits meanwhile

SAMPLER_INPUTS = (
    TensorSpec("whole_logits", "float32", ("U", "V"), "rows drawn from the whole vocabulary"),
    TensorSpec("whole_inverse_temperatures", "float32", ("U", "1"), "1 / temperature"),
    TensorSpec("whole_numbers", "float64", ("U", "1"), "uniform in [0, 1)"),
    TensorSpec("filtered_logits", "float32", ("F", "V"), "rows drawn from filtered tokens"),
    TensorSpec("filtered_inverse_temperatures", "float32", ("F", "1"), "1 / temperature"),
    TensorSpec("filtered_numbers", "float64", ("F", "1"), "uniform in [0, 1)"),
    TensorSpec("top_k", "int64", ("F", "1"), "1 to V; V turns the filter off"),
    TensorSpec("top_p", "float64", ("F", "1"), "above 0; 1 turns the filter off"),
    TensorSpec("min_p", "float64", ("F", "1"), "0 turns the filter off"),
    TensorSpec("candidates", "int64", ("1",), "how many likeliest tokens a filter looks at"),
    TensorSpec("scored_logits", "float32", ("L", "V"), "rows whose log-probabilities are wanted"),
    TensorSpec("scored_tokens", "int64", ("L", "1"), "the token of each"),
)
SAMPLER_OUTPUTS = (
    TensorSpec("whole_tokens", "int64", ("U", "1"), "drawn tokens"),
    TensorSpec("whole_totals", "float64", ("U", "1"), "NaN unless the row can be drawn from"),
    TensorSpec("filtered_tokens", "int64", ("F", "1"), "drawn tokens, if covered"),
    TensorSpec(
        "filtered_covered", "bool", ("F", "1"), "whether the candidates hold all tokens kept"
    ),
    TensorSpec("filtered_totals", "float64", ("F", "1"), "NaN unless the row can be drawn from"),
    TensorSpec("scored_logprobs", "float64", ("L", "1"), "of the token"),
    TensorSpec("top_tokens", "int64", ("L", "T"), "the likeliest tokens, likeliest first"),
    TensorSpec("top_logprobs", "float64", ("L", "T"), "theirs"),
)
