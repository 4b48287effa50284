"""What a precision must reach on the evaluation texts for a bundle of it to be built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol


class Measured(Protocol):
    """The figures that gates look at; see ``report.Figures``."""

    @property
    def mean_kl(self) -> float:
        """In nats."""

    @property
    def top1_agreement(self) -> float:
        """A share."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Limits on the figures of all texts together.

    Attributes:
        mean_kl: the largest mean divergence that passes, in nats.
        top1_agreement: the least share of the same likeliest tokens that passes.
        instead: what to build where it doesn't.
    """

    mean_kl: float
    top1_agreement: float
    instead: str

    def shortfalls(self, figures: Measured) -> list[str]:
        """Each figure that is past its limit, in words."""
        found = []
        if not figures.mean_kl <= self.mean_kl:
            found.append(
                f"the mean KL divergence from the fp32 source is {figures.mean_kl:.3g} nats (at "
                f"most {self.mean_kl:g})"
            )
        if not figures.top1_agreement >= self.top1_agreement:
            found.append(
                f"the likeliest token is the same in {figures.top1_agreement:.1%} of all places "
                f"(at least {self.top1_agreement:.1%})"
            )
        return found


# A gate tells a model that was quantised well from one that was damaged; it is no goal. So it lies
# some five times above what a small model, which suffers most, comes to when nothing is wrong.
#
# fp32: the same weights, so what is left is the order of sums, and the 1e-8 nats of the file.
# int8: SmolLM2-135M is off by 0.007, and by 0.046 where its outliers are left alone.
# int4: good 4-bit weights cost a model of 135 million weights 0.03 to 0.06, and larger ones less;
#   plain rounding of the smallest models passes 0.15, and such text reads differently.
GATES: Mapping[str, Gate] = MappingProxyType(
    {
        "fp32": Gate(1e-4, 0.995, "report this as a defect, with the model's name"),
        "int8": Gate(0.05, 0.90, "build with --precision fp32"),
        "int4": Gate(0.15, 0.80, "build with --precision int8 or fp32"),
    }
)
# Of a graph whose keys and values have 8 bits too, which is rounding as coarse as that of int8.
_CACHE = "int8"


def gate_of(precision: str) -> Gate | None:
    """The gate of a precision as manifests name it, such as ``int8`` or ``int8+int8kv``.

    Returns:
        None if there is none for it.
    """
    weights, _, cache = precision.partition("+")
    gate = GATES.get(weights)
    if gate is None or not cache:
        return gate
    other = GATES[_CACHE]
    return Gate(
        max(gate.mean_kl, other.mean_kl),
        min(gate.top1_agreement, other.top1_agreement),
        "build with --kv-cache same",
    )
