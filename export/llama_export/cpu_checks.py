"""What is checked of a bundle for the CPU: the graph's arithmetic, and what rounding costs.

A graph in float32 is compared with the decoder, row by row. What is rounded has no rows to be
compared with: there the predictions of the evaluation texts are measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_export.quality import require_quality
from llama_export.verify import Verification
from llama_runtime.evaluation.report import QualityReport


@dataclass(frozen=True, slots=True)
class CpuVerification:
    """What was found out about a bundle for the CPU.

    Attributes:
        graph: how far a float32 graph is from the decoder; None if it is rounded.
        quality: how far its predictions are from the source's; None if that wasn't measured.
        finer: what to do about a quality that is too low, before another precision is taken.
    """

    graph: Verification | None
    quality: QualityReport | None
    finer: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the bundle may be used."""
        found = (self.graph, self.quality)
        return all(one is None or one.passed for one in found)

    def require_passed(self) -> None:
        """Raise an ``ExportError`` that says what is off, unless it passed."""
        if self.graph is not None:
            self.graph.require_passed()
        if self.quality is not None:
            require_quality(self.quality, self.finer)

    def as_dict(self) -> dict[str, object]:
        """As the manifest records it."""
        figures = {} if self.graph is None else self.graph.as_dict()
        return figures if self.quality is None else figures | {"quality": self.quality.as_dict()}

    def summary(self) -> str:
        """What was found, a sentence or a table each."""
        lines = [] if self.graph is None else [self.graph.summary()]
        if self.quality is not None:
            lines += [self.quality.table() + self.quality.verdict()]
        return "\n".join(lines) or "the graph has not been run: there is nothing to compare with"
