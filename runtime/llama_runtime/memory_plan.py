"""How much memory a bundle needs, and whether the machine has it, before anything is loaded.

Four parts: the weights; the cache, all of whose tokens count although an untouched one costs
nothing, because an admitted sequence must be able to end; prefixes, the tokens of prompts that are
kept for others, which cost nothing untouched either; and the workspace, which is everything else:
the interpreter, the libraries, and what the largest step holds at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from llama_runtime.contract import (
    CACHE_ITEM_BYTES,
    CHUNK_MULTIPLE,
    MAX_CELLS,
    PROMPT_CHUNK,
    SAMPLER_ROWS,
    DType,
    Geometry,
    cache_capacity,
    max_logits_rows,
)
from llama_runtime.errors import CapacityError
from llama_runtime.machine import Memory
from llama_runtime.manifest import Manifest

MAX_BATCH = 1024
MIN_LEN = 2  # a prompt token and a completion token
LEN_STEP = 64  # proposals of max_len are multiples of it: what is free changes all the time
FLOAT_BYTES = 4

# Measured with onnxruntime 1.32 on Linux (docs/decisions.md), and rounded up.
PROGRAM_BYTES = 80_000_000  # the interpreter, numpy, onnxruntime and its graph
TOKEN_BYTES = 1_000  # the tokenizer and the table of bytes, for each token of the vocabulary
ARENA_SLACK = 1.25  # what onnxruntime's arena holds, over what a step needs


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a setting needs, and what there is.

    Attributes:
        geometry: the model's numbers.
        weights: bytes of the graph and the weights.
        available: what this process may still take.
        max_batch: B, sequences that run at once.
        max_len: the most tokens of one sequence.
        prompt_budget: the most prompt tokens of a step.
        prefix_tokens: tokens of prompts that are kept beside the cache, whole blocks of them.
        cache_dtype: of keys and values.
    """

    geometry: Geometry
    weights: int
    available: Memory
    max_batch: int
    max_len: int
    prompt_budget: int
    prefix_tokens: int = 0
    cache_dtype: DType = "float32"

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, in all layers."""
        g = self.geometry
        numbers = 2 * g.num_layers * g.num_kv_heads * g.head_dim
        return CACHE_ITEM_BYTES[self.cache_dtype] * numbers

    @property
    def num_prefix_blocks(self) -> int:
        """Blocks in which the beginnings of prompts are kept."""
        return self.prefix_tokens // CHUNK_MULTIPLE

    @property
    def prefixes(self) -> int:
        """Bytes of keys and values of what is kept, all of them touched."""
        return self.token_bytes * self.prefix_tokens

    @property
    def cache(self) -> int:
        """Bytes of keys and values, [B, K, C, D] in each layer, all of them touched."""
        return self.token_bytes * self.max_batch * cache_capacity(self.max_len, PROMPT_CHUNK)

    @property
    def workspace(self) -> int:
        """Bytes of everything else.

        In the largest step attention holds its input and its output for every cell, [B, S], and
        queries, keys and values once more after RoPE; the rest of a layer holds its packed rows,
        [N], and the head its logits, [R, V]. The sampler holds up to three times the rows that it
        takes at once.
        """
        g = self.geometry
        queries = g.num_heads * g.head_dim
        qkv = queries + 2 * g.num_kv_heads * g.head_dim
        cells = max(self.max_batch, MAX_CELLS) * (2 * qkv + queries)
        rows = max(self.max_batch, self.prompt_budget) * (
            qkv + 3 * g.hidden_size + 5 * g.intermediate_size
        )
        logits = max_logits_rows(self.max_batch) * g.vocab_size
        sampler = 3 * min(self.max_batch, SAMPLER_ROWS) * g.vocab_size
        step = FLOAT_BYTES * (cells + rows + logits + sampler)
        return PROGRAM_BYTES + TOKEN_BYTES * g.vocab_size + int(ARENA_SLACK * step)

    @property
    def total(self) -> int:
        """Bytes of all of them together."""
        return self.weights + self.cache + self.prefixes + self.workspace

    @property
    def fits(self) -> bool:
        """Whether the total is there."""
        return self.total <= self.available.num_bytes

    @property
    def largest_max_batch(self) -> int:
        """The largest ``max_batch`` that fits with this ``max_len``; 0 if none does."""
        return _largest(lambda n: replace(self, max_batch=n).fits, 1, MAX_BATCH)

    @property
    def largest_max_len(self) -> int:
        """The largest ``max_len`` that fits with this ``max_batch``; 0 if none does.

        It is the model's limit, or a multiple of 64 unless it is smaller than that.
        """
        limit = self.geometry.max_positions
        length = _largest(lambda n: replace(self, max_len=n).fits, MIN_LEN, limit)
        return length if length in (0, limit) or length < LEN_STEP else length - length % LEN_STEP

    @property
    def largest_prefix_tokens(self) -> int:
        """The largest ``prefix_tokens`` that fits, up to what is wanted; 0 if none does."""
        beside = replace(self, prefix_tokens=0)
        block = replace(self, prefix_tokens=CHUNK_MULTIPLE).prefixes
        num_blocks = max(0, (self.available.num_bytes - beside.total) // block)
        return CHUNK_MULTIPLE * min(num_blocks, self.num_prefix_blocks)

    def check(self) -> None:
        """Refuse a setting that doesn't fit.

        Raises:
            CapacityError: with the numbers, and the nearest settings that fit.
        """
        if self.fits:
            return
        advice, param = self._nearest()
        prefixes = f", prefixes {megabytes(self.prefixes)}" if self.prefixes else ""
        raise CapacityError(
            f"max_batch {self.max_batch} and max_len {self.max_len} need {megabytes(self.total)}: "
            f"weights {megabytes(self.weights)}, cache {megabytes(self.cache)}{prefixes}, "
            f"workspace {megabytes(self.workspace)}; {megabytes(self.available.num_bytes)} are "
            f"available ({self.available.bound}): {advice}",
            param=param,
        )

    def summary(self) -> str:
        """The plan in one line."""
        prefixes = f"prefixes up to {megabytes(self.prefixes)}, " if self.prefixes else ""
        kind = "" if self.cache_dtype == "float32" else f" in {self.cache_dtype}"
        return (
            f"memory: weights {megabytes(self.weights)}, cache up to {megabytes(self.cache)}"
            f"{kind}, {prefixes}workspace {megabytes(self.workspace)}; "
            f"{megabytes(self.available.num_bytes)} available"
        )

    def to_dict(self) -> dict[str, object]:
        """The settings, the numbers in bytes and the verdict, for JSON."""
        return {
            "max_batch": self.max_batch,
            "max_len": self.max_len,
            "prefix_tokens": self.prefix_tokens,
            "cache_dtype": self.cache_dtype,
            "weights": self.weights,
            "cache": self.cache,
            "prefixes": self.prefixes,
            "workspace": self.workspace,
            "total": self.total,
            "available": self.available.num_bytes,
            "bound": self.available.bound,
            "fits": self.fits,
            "largest_max_batch": self.largest_max_batch,
            "largest_max_len": self.largest_max_len,
        }

    def _nearest(self) -> tuple[str, str]:
        """What to set instead, and the parameter that is to blame."""
        batch, length = self.largest_max_batch, self.largest_max_len
        if batch and length < LEN_STEP:  # no help to anybody
            length = 0
        settings = [f"max_batch {batch}"] * (batch > 0) + [f"max_len {length}"] * (length > 0)
        param = "max_batch" if batch else "max_len"
        if self.prefix_tokens and replace(self, prefix_tokens=0).fits:
            settings.append(f"prefix_tokens {self.largest_prefix_tokens}")
            param = "prefix_tokens"
        if settings:
            return f"set {', or '.join(settings)}", param
        if length := replace(self, max_batch=1).largest_max_len:
            return f"set max_batch 1 and max_len {length}", "max_batch"
        return "the model itself doesn't fit, with one sequence of any length", "bundle"


def describe(plan: MemoryPlan) -> str:
    """A plan as a page to read, no wider than 40 columns, ending in a newline."""
    sizes = {
        "weights": plan.weights,
        "cache": plan.cache,
        "prefixes": plan.prefixes,
        "workspace": plan.workspace,
        "total": plan.total,
        "available": plan.available.num_bytes,
    }
    if not plan.prefix_tokens:
        del sizes["prefixes"]
    figures = {name: megabytes(size) for name, size in sizes.items()}
    width = max(map(len, figures.values()))
    lines = [f"max_batch {plan.max_batch}, max_len {plan.max_len}", ""]
    lines += [f"{name:<11}{figure:>{width}}" for name, figure in figures.items()]
    lines[3] += f"  {plan.cache_dtype}"
    lines[-1] += f"  {plan.available.bound}"
    lines += [
        "",
        "fits" if plan.fits else "does not fit",
        f"max_batch up to {plan.largest_max_batch:>6} at max_len {plan.max_len}",
        f"max_len up to   {plan.largest_max_len:>6} at max_batch {plan.max_batch}",
    ]
    return "\n".join(lines) + "\n"


def weight_bytes(manifest: Manifest, dialect: str) -> int:
    """Bytes of a dialect's graph and of the weights that it points into.

    The kernels' packed copies are as large, and take the place of the file's pages.
    """
    graphs = {graph.file for graph in manifest.graphs if graph.dialect == dialect}
    return sum(
        entry.size
        for name, entry in manifest.files.items()
        if name in graphs or name.endswith(".safetensors")
    )


def megabytes(num_bytes: int) -> str:
    """A size to read: ``5,981 MB``."""
    return f"{num_bytes / 1e6:,.0f} MB"


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number in ``low`` to ``high`` that fits, or 0; what is below one that fits does.

    By bisection: a plan is cheap, but a model's limit may be in the millions.
    """
    if not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
