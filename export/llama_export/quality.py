"""How good is what was built? The fp32 source's predictions of the evaluation texts, kept with it.

At build time the source itself reads the texts, in float32 and a layer at a time: a model of any
size fits into the space of its largest layer or matrix, and one row of E numbers for each token.
What it predicts goes into the bundle (``llama_runtime.evaluation.reference`` has the format), and
the bundle is measured against that file by the code that ``llama-run eval`` runs: the figures of
the manifest can be had again without the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llama_decoder.config import LlamaConfig
from llama_decoder.names import EMBEDDING, HEAD, LAST_NORM
from llama_decoder.rope import rope_tables
from llama_decoder.weights import Array, parameter_shapes
from llama_export.errors import ExportError
from llama_export.quantise.layers import (
    normed,
    pass_layer,
    take,
    take_layer,
)
from llama_export.stages import Advance, counted
from llama_runtime.bundle import Bundle
from llama_runtime.bundle_limits import REFERENCE_LOGPROBS, TOKENIZER
from llama_runtime.evaluation.partition import Prediction, TokenIds, predictions
from llama_runtime.evaluation.reference import Reference, Window, encoded
from llama_runtime.evaluation.report import QualityReport
from llama_runtime.evaluation.scoring import evaluate, evenly
from llama_runtime.tokenizer import Tokenizer

WINDOW = 512  # tokens of a window, unless the model's longest sequence is shorter
LEAST_WINDOW = 32  # what is left of a text is not worth a window below that
# Of one kind of text: so the file stays small, and a tokenizer that makes a token of each byte
# doesn't make an evaluation four times as long.
KIND_TOKENS = 6144
TOP = 32  # likeliest tokens that are kept of each place; docs/quality.md has the reason
SAMPLES = 16  # of the others
HEAD_ELEMENTS = 1 << 24  # of the logits that are in memory together: 64 MB


class Text(Protocol):
    """See ``llama_runtime.evaluation.texts.EvaluationText``."""

    @property
    def kind(self) -> str:
        """What it is: prose, code and so on."""

    @property
    def text(self) -> str:
        """The text itself."""


def write_reference(
    directory: Path,
    config: LlamaConfig,
    weights: Iterable[tuple[str, Array]],
    progress: Advance = lambda _: None,
) -> None:
    """Write what the source thinks of the evaluation texts into a bundle that is being built.

    Args:
        directory: of the bundle, with its tokenizer in it.
        config: the model's numbers.
        weights: the source's parameters in float32, in the decoder's order.
        progress: called with the parameters read so far, of ``num_parameters``.

    Raises:
        ExportError: the weights or the predictions aren't finite, or a text is too short.
    """
    reference = make_reference(directory / TOKENIZER, config, weights, progress)
    (directory / REFERENCE_LOGPROBS).write_bytes(reference.to_bytes())


def make_reference(
    tokenizer_path: Path,
    config: LlamaConfig,
    weights: Iterable[tuple[str, Array]],
    progress: Advance = lambda _: None,
) -> Reference:
    """What the source thinks of the evaluation texts; see ``write_reference``.

    Args:
        tokenizer_path: the bundle's.
        config: as there.
        weights: as there.
        progress: as there.

    Raises:
        ExportError: as there.
    """
    from llama_runtime.evaluation.texts import evaluation_texts, texts_sha256

    windows = cut_windows(Tokenizer(tokenizer_path), evaluation_texts(), config.max_positions)
    return reference_logprobs(config, weights, windows, texts_sha256(), progress)


def num_parameters(config: LlamaConfig) -> int:
    """Parameters that ``write_reference`` reads, for progress."""
    return len(parameter_shapes(config))


def measure(
    bundle: Bundle, progress: Advance = lambda _: None, reference: Reference | None = None
) -> QualityReport:
    """Measure a bundle for the CPU against the source's predictions.

    Args:
        bundle: its files have been checked.
        progress: called with the percentage that is done.
        reference: the predictions; None for those that the bundle holds.

    Raises:
        BundleError: the bundle holds no usable reference.
        BackendError: the graph doesn't load or run.
    """
    return evaluate(
        bundle,
        reference=reference,
        progress=lambda done, total: progress(100 * done // total),
    )


def require_quality(report: QualityReport, finer: str | None = None) -> None:
    """Refuse a bundle whose predictions are too far from the source's.

    Args:
        report: the figures.
        finer: what to do, where something comes before another precision.

    Raises:
        ExportError: names each figure, its limit, and what to do; or says that there is no gate.
    """
    gate = report.gate
    if gate is None:
        raise ExportError(report.verdict())
    if report.shortfalls:
        raise ExportError(
            f"the quality of {report.precision} is too low for this model: "
            f"{' and '.join(report.shortfalls)}; {finer or gate.instead}"
        )


def cut_windows(tokenizer: Tokenizer, texts: Sequence[Text], max_positions: int) -> list[Window]:
    """Texts as windows, each of which begins as a raw prompt does.

    Every text is cut from its beginning into windows of up to ``WINDOW`` tokens with the opening
    tokens of a prompt (BOS, for most Llamas). Where a kind has more than ``KIND_TOKENS`` tokens,
    windows are left out at equal distances.

    Args:
        tokenizer: the model's.
        texts: of one or more kinds.
        max_positions: the model's longest sequence.

    Raises:
        ExportError: a kind of text doesn't fill one window.
    """
    size = min(WINDOW, max_positions)
    found: dict[str, list[Window]] = {text.kind: [] for text in texts}
    for text in texts:
        found[text.kind] += _windows(tokenizer, text, size)
    for kind, windows in found.items():
        if not windows:
            raise ExportError(
                f"the evaluation text of the kind {kind} has fewer than {LEAST_WINDOW} tokens"
            )
    most = KIND_TOKENS // size
    return [window for windows in found.values() for window in evenly(windows, most)]


def reference_logprobs(
    config: LlamaConfig,
    weights: Iterable[tuple[str, Array]],
    windows: Sequence[Window],
    texts_sha256: str,
    progress: Advance = lambda _: None,
    *,
    top: int = TOP,
    samples: int = SAMPLES,
) -> Reference:
    """What a model in float32 predicts at each place of some windows.

    Args:
        config: the model's numbers.
        weights: every parameter in float32, in the decoder's order. An embedding that is the output
            matrix too is kept, of the rest a layer at a time.
        windows: at least one, none longer than the model's longest sequence.
        texts_sha256: of the texts that the windows are of.
        progress: called with the parameters read so far.
        top: K, likeliest tokens to keep.
        samples: M, tokens to draw from the others; always the same ones of the same logits.

    Raises:
        ExportError: weights come in another order, or they or the logits aren't finite.
    """
    found: list[tuple[Prediction, TokenIds, TokenIds]] = []
    rng = np.random.default_rng(0)
    step = max(1, HEAD_ELEMENTS // config.vocab_size)
    with torch.no_grad():
        rows, head = _last_rows(config, counted(weights, progress), windows)
        targets = np.array([token for window in windows for token in window.tokens[1:]])
        for start in range(0, len(rows), step):
            logits = F.linear(rows[start : start + step], head)
            if not logits.isfinite().all():
                raise ExportError("the source's logits are no finite numbers")
            top_ids = logits.topk(min(top, config.vocab_size - 1)).indices
            drawn = _drawn(logits, top_ids, torch.from_numpy(rng.random((len(logits), 1))), samples)
            ids = (top_ids.numpy(), drawn.numpy())
            found.append((predictions(logits.numpy(), *ids, targets[start : start + step]), *ids))
    predicted, top_parts, sample_parts = zip(*found, strict=True)
    return Reference(
        texts_sha256=texts_sha256,
        vocab_size=config.vocab_size,
        windows=tuple(windows),
        targets=np.concatenate([one.targets for one in predicted]).astype(np.float32),
        top_ids=np.concatenate(top_parts),
        sample_ids=np.concatenate(sample_parts),
        codes=encoded(np.concatenate([one.kept.parts for one in predicted])),
        sample_codes=encoded(np.concatenate([one.kept.samples for one in predicted])),
    )


def _drawn(logits: Tensor, top_ids: Tensor, uniform: Tensor, count: int) -> Tensor:
    """Tokens [R, count] drawn from each row of logits but for some tokens, as likely as there.

    They come from places at equal distances along the sum of what is left, from one random place
    on, which varies less than places of their own.

    Args:
        logits: [R, V].
        top_ids: [R, K], not to be drawn.
        uniform: [R, 1], in [0, 1).
        count: M.
    """
    weights = logits.softmax(1).scatter_(1, top_ids, 0.0)
    sums = weights.cumsum(1, dtype=torch.float64)
    places = (uniform + torch.arange(count)) / count * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True).clamp_(max=logits.shape[1] - 1)


def _windows(tokenizer: Tokenizer, text: Text, size: int) -> Iterator[Window]:
    plain, prompt = tokenizer.encode_templated(text.text), tokenizer.encode(text.text)
    added = len(prompt) - len(plain)
    opening = next(prompt[:n] for n in range(added + 1) if prompt[n : n + len(plain)] == plain)
    step = size - len(opening)
    for start in range(0, len(plain), step):
        tokens = opening + plain[start : start + step]
        if len(tokens) >= min(LEAST_WINDOW, size):
            yield Window(text.kind, tuple(tokens))


def _last_rows(
    config: LlamaConfig, given: Iterator[tuple[str, Array]], windows: Sequence[Window]
) -> tuple[Tensor, Tensor]:
    """What the head is given at each place that predicts a token, [P, E], and the head, [V, E].

    Shorter windows are padded at their ends, which nothing before them sees.
    """
    width = max(len(window.tokens) for window in windows)
    ids = torch.tensor([[*w.tokens, *[0] * (width - len(w.tokens))] for w in windows])
    embedding = torch.from_numpy(take(given, EMBEDDING))
    hidden = F.embedding(ids, embedding)  # [W, S, E]
    head = embedding if config.tie_embeddings else None
    del embedding
    tables = rope_tables(config, width)
    for index in range(config.num_layers):
        layer = take_layer(given, index)
        pass_layer(config, layer, hidden, tables)
        del layer  # before the next is read
    rows = torch.cat([hidden[i, : w.num_targets] for i, w in enumerate(windows)])
    rows = normed(rows, torch.from_numpy(take(given, LAST_NORM)), config)
    return rows, head if head is not None else torch.from_numpy(take(given, HEAD))
