"""Does a bundle compute on a GPU what the decoder computes? For hosts that have one.

The real engine runs a ragged job greedily: prompts of one token and of several blocks, more
sequences than slots, steps that replay captured graphs, blocks of shared prefixes. Then the eager
decoder computes the logits of every token of every sequence in float32, from the stored weights,
and what the engine chose and how likely it found it is compared with that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf, isfinite
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from llama_decoder.config import LlamaConfig
from llama_decoder.weights import parameter_shapes
from llama_export.errors import ExportError
from llama_export.precision import Precision
from llama_export.weight_file import WEIGHT_FILE
from llama_export.weights_cost import decoded, streamed_logits
from llama_runtime.backends.cuda_device import Device
from llama_runtime.backends.ort_library import import_library
from llama_runtime.bundle import Bundle
from llama_runtime.contract import PAGED, DType
from llama_runtime.cuda_engine import cuda_engine
from llama_runtime.cuda_plan import block_size_of
from llama_runtime.engine import Engine
from llama_runtime.errors import BackendError, DependencyError
from llama_runtime.params import SamplingParams
from llama_runtime.tokenizer import Tokenizer

NUM_SLOTS = 5
PROMPT_BUDGET = 300
PROMPT_LENGTHS = (1, 2, 33, 300, 64, 257, 7, 256, 255, 5, 1, 90)
SHARED_PREFIX = 520  # tokens that two prompts have in common
MAX_TOKENS = 12
NUM_TOP = 20
# By the type of keys and values, which is that of the activations or a coarser one. Of a
# log-probability, in standard deviations of the logits: 16-bit sums against 32-bit ones. With its 3
# bits of mantissa e4m3 rounds each key and value by up to 6 %, which the decoder here doesn't: so
# wide a limit tells a cache that is broken from one that is rounded, and no more.
TOLERANCES: dict[DType, float] = {"float16": 0.05, "bfloat16": 0.4, "float8e4m3fn": 1.0}
NEAR_TIES: dict[DType, float] = {"float16": 0.02, "bfloat16": 0.2, "float8e4m3fn": 0.5}

Tops = list[tuple[tuple[int, float], ...]]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """How far a GPU is from the decoder.

    Attributes:
        device: the GPU's name.
        device_rows: rows of logits compared.
        device_max_logprob_difference: the largest difference of two log-probabilities, of the
            likeliest 20 tokens of each row, in standard deviations of the logits.
        device_tolerance: the largest one that passes.
        device_greedy_agreement: share of the rows with the same likeliest token.
        device_near_ties: rows that differ there because the decoder gives the two tokens logits
            that close.
        device_max_divergence: the largest Kullback-Leibler divergence of the GPU's distribution
            from the decoder's, in nats, over the likeliest 20 tokens and all others together.
    """

    device: str
    device_rows: int
    device_max_logprob_difference: float
    device_tolerance: float
    device_greedy_agreement: float
    device_near_ties: int
    device_max_divergence: float

    @property
    def passed(self) -> bool:
        """Whether what differs can be rounding."""
        agreeing = round(self.device_greedy_agreement * self.device_rows) + self.device_near_ties
        close = self.device_max_logprob_difference <= self.device_tolerance
        return close and agreeing == self.device_rows

    def require_passed(self) -> None:
        """Raise an ``ExportError`` with the figures unless it passed."""
        if not self.passed:
            raise ExportError(f"the graph does not compute what the model does: {self.summary()}")

    def as_dict(self) -> dict[str, object]:
        """As the manifest records it."""
        return asdict(self)

    def summary(self) -> str:
        """The figures in one sentence."""
        return (
            f"on {self.device} log-probabilities differ by at most "
            f"{self.device_max_logprob_difference:.2g} of the logits' standard deviation (limit "
            f"{self.device_tolerance:g}), and {self.device_greedy_agreement:.1%} of "
            f"{self.device_rows} likeliest tokens agree, {self.device_near_ties} more are near "
            f"ties; the distributions diverge by {self.device_max_divergence:.2g} nats at most"
        )


def usable_device() -> Device | None:
    """The first CUDA device, if there is one and onnxruntime can run on it."""
    with suppress(BackendError, DependencyError):
        ort, _ = import_library("gpu")
        if "CUDAExecutionProvider" in ort.get_available_providers():
            return Device(0)
    return None


def check_on_device(
    bundle: Bundle,
    config: LlamaConfig,
    precision: Precision,
    device: Device,
    *,
    block_size: int | None = None,
    num_slots: int = NUM_SLOTS,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
) -> DeviceCheck:
    """Compare a paged bundle with the eager decoder over its stored weights.

    Args:
        bundle: its files have been checked.
        config: the model's numbers.
        precision: the recipe that the manifest names.
        device: closed when this returns.
        block_size: tokens of a block; None takes the one that the runtime would.
        num_slots: sequences that run at once.
        prompt_lengths: of the job, but for two prompts that share their beginning.

    Raises:
        BackendError: the graph doesn't load or run.
    """
    size = block_size or block_size_of(config.head_dim)
    longest = min(config.max_positions, SHARED_PREFIX + 50 + MAX_TOKENS)
    engine = cuda_engine(
        bundle.graph_path(PAGED.name),
        config.geometry,
        device,
        Tokenizer(bundle.tokenizer_path).byte_table,
        (),
        dtype=precision.activations,
        cache_dtype=precision.cache,
        max_batch=num_slots,
        max_len=longest,
        num_blocks=num_slots * -(-longest // size),
        block_size=size,
        prompt_budget=PROMPT_BUDGET,
    )
    weights = bundle.path / WEIGHT_FILE
    return check_engine(engine, device.name, weights, config, precision, prompt_lengths)


def check_engine(
    engine: Engine,
    name: str,
    weights: Path,
    config: LlamaConfig,
    precision: Precision,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
) -> DeviceCheck:
    """Compare any engine over a GPU with the eager decoder over the stored weights.

    Args:
        engine: closed when this returns.
        name: of the GPU.
        weights: the weight file.
        config: the model's numbers.
        precision: what the weights are stored in.
        prompt_lengths: of the job, as far as the engine takes them.

    Raises:
        BackendError: the graph doesn't run.
    """
    try:
        prompts = _prompts(prompt_lengths, engine.max_len - MAX_TOKENS, config.vocab_size)
        tokens, tops = _generated(engine, prompts)
    finally:
        engine.close()
    expected = _expected(config, precision, weights, tokens, [len(prompt) for prompt in prompts])
    return _compared(name, precision, expected, tokens, tops)


def _prompts(lengths: Sequence[int], longest: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, vocab_size, min(SHARED_PREFIX, longest - 2)).tolist()
    tails = [rng.integers(0, vocab_size, count).tolist() for count in (2, 40)]
    prompts = [rng.integers(0, vocab_size, min(n, longest)).tolist() for n in lengths]
    return [*prompts, *((shared + tail)[:longest] for tail in tails)]


def _generated(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], list[Tops]]:
    """All tokens of each sequence, and the likeliest at the place of each that was generated."""
    params = SamplingParams(
        max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=True, top_logprobs=NUM_TOP
    )
    # The last comes when the one before it has left its prefix in the cache.
    seqs = [engine.add(prompt, params) for prompt in prompts[:-1]]
    _finish(engine)
    seqs.append(engine.add(prompts[-1], params))
    _finish(engine)
    for seq in seqs:
        if seq.finish_reason != "length":
            raise BackendError(f"a sequence ended with {seq.finish_reason}: its logits are broken")
    return [seq.token_ids for seq in seqs], [[one.top for one in seq.logprobs] for seq in seqs]


def _finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
    engine.check()


def _expected(
    config: LlamaConfig,
    precision: Precision,
    path: Path,
    tokens: list[list[int]],
    prompt_lengths: list[int],
) -> list[Logits]:
    """The decoder's logits of the rows that the engine sampled from, for each sequence."""
    with torch.no_grad(), safe_open(path, framework="pt") as file:
        rows = streamed_logits(
            config,
            ((name, decoded(file, precision, name)) for name in parameter_shapes(config)),
            {name: file.get_tensor(name).float() for name in ("rope_cos", "rope_sin")},
            tokens,
            keep=[
                start + length - 1 + i
                for start, length in zip(_starts(tokens), prompt_lengths, strict=True)
                for i in range(MAX_TOKENS)
            ],
        )
    return list(rows.reshape(len(tokens), MAX_TOKENS, -1))


def _starts(tokens: list[list[int]]) -> list[int]:
    return [int(start) for start in np.cumsum([0, *map(len, tokens[:-1])])]


def _compared(
    name: str,
    precision: Precision,
    expected: list[Logits],
    tokens: list[list[int]],
    tops: list[Tops],
) -> DeviceCheck:
    difference, agreeing, near, divergence = 0.0, 0, 0, 0.0
    spread = float(np.std(expected[0]))
    for logits, all_tokens, of_rows in zip(expected, tokens, tops, strict=True):
        for row, token, top in zip(logits, all_tokens[-MAX_TOKENS:], of_rows, strict=True):
            values = row.astype(np.float64)
            logprobs = values - values.max()
            logprobs -= np.log(np.exp(logprobs).sum())
            ids = [token_id for token_id, _ in top]
            found = np.array([logprob for _, logprob in top])
            difference = max(difference, float(np.abs(found - logprobs[ids]).max()) / spread)
            divergence = max(divergence, _divergence(logprobs[ids], found))
            same = int(values.argmax()) == token
            agreeing += same
            lost = float(values.max() - values[token])
            near += not same and lost < NEAR_TIES[precision.dialect.cache_dtype] * spread
    num_rows = len(tokens) * MAX_TOKENS
    return DeviceCheck(
        device=name,
        device_rows=num_rows,
        device_max_logprob_difference=difference if isfinite(difference) else inf,
        device_tolerance=TOLERANCES[precision.dialect.cache_dtype],
        device_greedy_agreement=agreeing / num_rows,
        device_near_ties=near,
        device_max_divergence=divergence if isfinite(divergence) else inf,
    )


def _divergence(expected: npt.NDArray[np.float64], found: npt.NDArray[np.float64]) -> float:
    """In nats, of some log-probabilities and the rest in one."""
    p, q = (
        np.append(np.exp(part), max(1 - np.exp(part).sum(), 1e-12)) for part in (expected, found)
    )
    return float((p * np.log(p / q)).sum())
