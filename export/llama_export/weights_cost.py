"""What does storing the weights in fewer bits cost? Measured without the graph.

A graph for a GPU can't run on every host that builds one. The weights can: the eager decoder
computes logits from the source's float32 weights and from what the bundle holds, both in float32,
so what is compared is the rounding of the weights and nothing else. Layers are read one after the
other, so a model of any size is compared in the space of its largest layer or matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from llama_decoder.attention import SlotInputs, eager_attention
from llama_decoder.config import LlamaConfig
from llama_decoder.decoder import DecoderLayer, rope_buffers
from llama_decoder.names import EMBEDDING, HEAD, LAST_NORM
from llama_decoder.weights import parameter_shapes
from llama_export.encoders import decode_int4
from llama_export.errors import ExportError
from llama_export.precision import Precision
from llama_export.stages import Advance, counted
from llama_runtime.tokenizer import Tokenizer

PROMPTS = (
    "The capital of France is",
    "Water boils at 100 degrees Celsius, and it freezes at",
    "def add(first, second):\n    return",
    "Once upon a time there was a llama who lived high up in the mountains, and every morning",
    "1, 2, 3, 4, 5, 6,",
)
MAX_PROMPT_TOKENS = 40  # of each

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class WeightsCost:
    """How far the logits of the stored weights are from those of the source's weights.

    Attributes:
        weights_precision: what the weights are stored in.
        weights_rows: rows of logits compared.
        weights_max_logit_difference: the largest difference of two logits; infinite if one is no
            number.
        weights_logit_spread: the standard deviation of the source's logits, to measure that by.
        weights_greedy_agreement: share of the rows with the same likeliest token.
        weights_near_ties: rows that differ there although the source gives the two tokens logits
            that are closer than the recipe's ``near_tie``.
        weights_least_agreement: the share, near ties included, below which the weights are broken.
    """

    weights_precision: str
    weights_rows: int
    weights_max_logit_difference: float
    weights_logit_spread: float
    weights_greedy_agreement: float
    weights_near_ties: int
    weights_least_agreement: float

    @property
    def passed(self) -> bool:
        """Whether what differs can be rounding."""
        agreeing = round(self.weights_greedy_agreement * self.weights_rows) + self.weights_near_ties
        enough = agreeing >= self.weights_least_agreement * self.weights_rows
        return isfinite(self.weights_max_logit_difference) and enough

    def require_passed(self) -> None:
        """Raise an ``ExportError`` with the figures unless it passed."""
        if not self.passed:
            raise ExportError(
                f"the weights in {self.weights_precision} are not those of the model: "
                f"{self.summary()}"
            )

    def as_dict(self) -> dict[str, object]:
        """As the manifest records it."""
        return asdict(self)

    def summary(self) -> str:
        """The figures in one sentence."""
        return (
            f"logits of the weights in {self.weights_precision} differ by at most "
            f"{self.weights_max_logit_difference:.2g} from the source's, whose standard deviation "
            f"is {self.weights_logit_spread:.2g}; {self.weights_greedy_agreement:.1%} of "
            f"{self.weights_rows} likeliest tokens agree, {self.weights_near_ties} more are near "
            "ties"
        )


def measure_weights(
    config: LlamaConfig,
    precision: Precision,
    source: Iterable[tuple[str, npt.NDArray[np.float32]]],
    stored: Path,
    tokenizer: Path,
    progress: Advance = lambda _: None,
) -> WeightsCost:
    """Compare the stored weights with those of the source, on a few fixed prompts.

    Args:
        config: the model's numbers.
        precision: what the weights are stored in.
        source: the source's parameters, in the decoder's order.
        stored: the weight file.
        tokenizer: the bundle's tokenizer file.
        progress: called with the parameters read so far, of ``num_read_parameters``.
    """
    prompts = _prompts(Tokenizer(tokenizer), config.max_positions)
    count = num_read_parameters(config) // 2
    originals = map(_as_tensor, source)
    with torch.no_grad():
        wanted = streamed_logits(config, originals, dict(rope_buffers(config)), prompts, progress)
        with safe_open(stored, framework="pt") as file:
            got = streamed_logits(
                config,
                ((name, decoded(file, precision, name)) for name in parameter_shapes(config)),
                {name: file.get_tensor(name).float() for name in ("rope_cos", "rope_sin")},
                prompts,
                lambda done: progress(count + done),
            )
    return compare_logits(precision, wanted, got)


def num_read_parameters(config: LlamaConfig) -> int:
    """Parameters that ``measure_weights`` reads, those of both sides, for progress."""
    return 2 * len(parameter_shapes(config))


def compare_logits(precision: Precision, wanted: Logits, got: Logits) -> WeightsCost:
    """The figures of two sets of logits [rows, V], of which the first is right."""
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(got - wanted).max())
    spread = float(wanted.std())
    rows = np.arange(len(wanted))
    best, chosen = wanted.argmax(axis=1), got.argmax(axis=1)
    same = best == chosen
    lost = wanted[rows, best] - wanted[rows, chosen]
    return WeightsCost(
        weights_precision=precision.weights,
        weights_rows=len(rows),
        weights_max_logit_difference=difference if isfinite(difference) else inf,
        weights_logit_spread=spread,
        weights_greedy_agreement=float(same.mean()),
        weights_near_ties=int((~same & (lost < precision.near_tie * spread)).sum()),
        weights_least_agreement=precision.least_agreement,
    )


def streamed_logits(
    config: LlamaConfig,
    parameters: Iterable[tuple[str, Tensor]],
    tables: dict[str, Tensor],
    prompts: Sequence[Sequence[int]],
    progress: Advance = lambda _: None,
    *,
    keep: Sequence[int] | None = None,
) -> Logits:
    """Logits of tokens of some prompts, from weights that are read as they are used.

    Args:
        config: the model's numbers.
        parameters: every parameter in float32, in the decoder's order. An embedding that is the
            output matrix too is kept, of the rest a layer at a time.
        tables: the RoPE tables, float32.
        prompts: token ids, none empty.
        progress: called with the parameters read so far.
        keep: which tokens, counted through all prompts; None takes all.

    Returns:
        float32 [tokens, V], prompt after prompt.
    """
    given = counted(parameters, progress)
    embedding = _take(given, EMBEDDING)
    x = F.embedding(torch.tensor([token for prompt in prompts for token in prompt]), embedding)
    head = embedding if config.tie_embeddings else None
    del embedding
    places = _places(prompts)
    shape = (len(prompts), config.num_kv_heads, max(map(len, prompts)), config.head_dim)
    empty = torch.zeros(shape)
    for number in range(config.num_layers):
        layer = _layer(config, given, f"model.layers.{number}.")
        x, _ = layer(x, (empty, empty), places, tables["rope_cos"], tables["rope_sin"])
        del layer  # before the next is read
    if keep is not None:
        x = x[torch.tensor(keep)]
    norm = _take(given, LAST_NORM)
    x = F.rms_norm(x, (config.hidden_size,), norm, config.rms_norm_eps)
    logits = F.linear(x, _take(given, HEAD) if head is None else head)
    return logits.numpy()


def _prompts(tokenizer: Tokenizer, max_positions: int) -> list[list[int]]:
    longest = min(MAX_PROMPT_TOKENS, max_positions)
    return [tokenizer.encode(text)[:longest] or [0] for text in PROMPTS]


def _places(prompts: Sequence[Sequence[int]]) -> SlotInputs:
    """The inputs of ``slots`` for a step of whole prompts; see ``contract.SLOTS``."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32)
    width = int(lengths.max())
    starts = lengths.cumsum(0) - lengths
    columns = torch.arange(width)
    real = columns < lengths[:, None]  # [B, S]
    return SlotInputs(
        unpack=torch.where(real, starts[:, None] + columns, 0),
        pack=real.flatten().nonzero().flatten(),
        seqlens_k=lengths - 1,
        query_seqlens=lengths,
        total_sequence_length=torch.tensor(width, dtype=torch.int32),
    )


def _layer(config: LlamaConfig, given: Iterator[tuple[str, Tensor]], prefix: str) -> DecoderLayer:
    """The next layer, over the next parameters."""
    with torch.device("meta"):
        layer = DecoderLayer(config, eager_attention)
    taken = islice(given, len(layer.state_dict()))
    state = {name.removeprefix(prefix): tensor for name, tensor in taken}
    layer.load_state_dict(state, strict=True, assign=True)
    return layer.requires_grad_(False).eval()


def _as_tensor(given: tuple[str, npt.NDArray[np.float32]]) -> tuple[str, Tensor]:
    name, value = given
    return name, torch.from_numpy(value)


def _take(given: Iterator[tuple[str, Tensor]], name: str) -> Tensor:
    found, tensor = next(given)
    if found != name:
        raise ExportError(f"expected the weights {name}, got {found}")
    return tensor


def decoded(file: Any, precision: Precision, parameter: str) -> Tensor:
    """A stored parameter in float32."""
    tensors: list[Tensor] = [file.get_tensor(name) for name in precision.stored_names(parameter)]
    if len(tensors) == 1:
        values = tensors[0].float()
        return values.t() if precision.is_transposed(parameter) else values
    packed, scales = tensors
    digits = packed.numpy() ^ precision.int4_mask
    return torch.from_numpy(decode_int4(digits, scales.numpy()))
