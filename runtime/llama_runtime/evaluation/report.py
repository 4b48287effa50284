"""The figures of a quality report, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import exp

import numpy as np
import numpy.typing as npt

from llama_runtime.evaluation.gates import Gate, gate_of

ALL = "all"  # the last line of the table
TAIL = 99.9  # percentile
_DIGITS = 6  # that are written: those after them are of one machine
_MOST_NATS = 700.0  # whose exponential is still a number

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """What was found at each place of some windows.

    Attributes:
        divergences: of the bundle's distribution from the reference, in nats, [P].
        agrees: whether the two have the same likeliest token, bool [P].
        nll: negative log-probability of the token that follows, by the bundle, [P].
        reference_nll: the same by the reference, [P].
        windows: the number of the window, [P].
    """

    divergences: Floats
    agrees: npt.NDArray[np.bool_]
    nll: Floats
    reference_nll: Floats
    windows: npt.NDArray[np.int64]

    def where(self, chosen: npt.NDArray[np.bool_]) -> Scores:
        """Those of some places."""
        return Scores(
            self.divergences[chosen],
            self.agrees[chosen],
            self.nll[chosen],
            self.reference_nll[chosen],
            self.windows[chosen],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How far a bundle's predictions are from the reference's, on some text.

    Attributes:
        tokens: predicted.
        windows: pieces of text that they lie in.
        mean_kl: mean Kullback-Leibler divergence of the bundle from the reference, in nats.
        tail_kl: its 99.9th percentile over the tokens.
        top1_agreement: share of the places with the same likeliest token.
        perplexity: the exponential of the mean negative log-probability of the text, by the bundle.
        reference_perplexity: the same by the reference.
        perplexity_ratio: the first over the second.
        perplexity_ratio_error: its standard error; None for a single window.
    """

    tokens: int
    windows: int
    mean_kl: float
    tail_kl: float
    top1_agreement: float
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_error: float | None

    @classmethod
    def of(cls, scores: Scores) -> Figures:
        """The figures of some places, of which there is at least one.

        The two models predict the same tokens, so the error of the ratio comes from their
        differences, token by token. Those of one window depend on each other, so windows are
        what is drawn at random: with d the difference of a token and m the mean of all, the
        variance of m is the sum over the W windows of (sum of d - m)^2, over the square of the
        number of tokens, times W / (W - 1). That of exp(m) follows from its slope.
        """
        differences = scores.nll - scores.reference_nll
        mean = float(differences.mean())
        ratio = _exponential(mean)
        _, numbers = np.unique(scores.windows, return_inverse=True)
        sums = np.bincount(numbers, weights=differences - mean)
        count = len(sums)
        error = None
        if count > 1:
            variance = float((sums**2).sum()) / len(differences) ** 2 * count / (count - 1)
            error = ratio * variance**0.5
        return cls(
            tokens=len(differences),
            windows=count,
            mean_kl=float(scores.divergences.mean()),
            tail_kl=float(np.percentile(scores.divergences, TAIL)),
            top1_agreement=float(scores.agrees.mean()),
            perplexity=_exponential(float(scores.nll.mean())),
            reference_perplexity=_exponential(float(scores.reference_nll.mean())),
            perplexity_ratio=ratio,
            perplexity_ratio_error=error,
        )

    def as_dict(self) -> dict[str, object]:
        """As JSON has it, to six significant digits."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class QualityReport:
    """How good a bundle is.

    Attributes:
        precision: of its graph, as the manifest names it.
        texts_sha256: of the texts.
        kinds: the figures of each kind of text.
        total: those of all texts together.
    """

    precision: str
    texts_sha256: str
    kinds: Mapping[str, Figures]
    total: Figures

    @property
    def gate(self) -> Gate | None:
        """What the precision must reach; None if there is no gate for it."""
        return gate_of(self.precision)

    @property
    def shortfalls(self) -> list[str]:
        """Each figure that is past its gate, in words; empty if it passed or there is no gate."""
        gate = self.gate
        return [] if gate is None else gate.shortfalls(self.total)

    @property
    def passed(self) -> bool:
        """Whether all figures are within a gate."""
        return self.gate is not None and not self.shortfalls

    def as_dict(self) -> dict[str, object]:
        """As the manifest records it: figures of the whole, then of each kind."""
        return {
            "texts_sha256": self.texts_sha256,
            **self.total.as_dict(),
            "kinds": {kind: figures.as_dict() for kind, figures in self.kinds.items()},
        }

    def table(self) -> str:
        """A line for each kind of text and one for all, below 80 columns, ending in a newline."""
        head = ("", "tokens", "mean KL", "99.9 %", "top-1", "perplex.", "fp32's", "ratio")
        rows = [*self.kinds.items(), (ALL, self.total)]
        return "\n".join([_line(head), *(_line(_cells(*row)) for row in rows)]) + "\n"

    def verdict(self) -> str:
        """What the gate says, in one sentence."""
        gate = self.gate
        if gate is None:
            return f"there is no gate for the precision {self.precision}"
        if self.shortfalls:
            return f"{self.precision} fails: {' and '.join(self.shortfalls)}"
        return (
            f"{self.precision} passes: mean KL at most {gate.mean_kl:g} nats, top-1 agreement at "
            f"least {gate.top1_agreement:.1%}"
        )


def _cells(name: str, figures: Figures) -> tuple[str, ...]:
    error = figures.perplexity_ratio_error
    return (
        name,
        f"{figures.tokens:,}",
        f"{figures.mean_kl:.3g}",
        f"{figures.tail_kl:.3g}",
        f"{figures.top1_agreement:.1%}",
        f"{figures.perplexity:.4g}",
        f"{figures.reference_perplexity:.4g}",
        f"{figures.perplexity_ratio:.4f}" + ("" if error is None else f" ± {error:.4f}"),
    )


def _line(cells: tuple[str, ...]) -> str:
    name, tokens, mean, tail, top, perplexity, reference, ratio = cells
    return (
        f"{name:<11.11} {tokens:>6} {mean:>8} {tail:>8} {top:>6} {perplexity:>9} {reference:>9} "
        f"{ratio:>15}"
    )


def _exponential(nats: float) -> float:
    return exp(min(nats, _MOST_NATS))


def _rounded(value: object) -> object:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
