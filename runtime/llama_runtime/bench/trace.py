"""When what came of a request came."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Trace:
    """One request.

    Attributes:
        arrived: when it was asked, in seconds of some clock.
        input_len: prompt tokens.
        output_len: completion tokens.
        times: when each token came, or each piece of text where a server may send several tokens in
            one; on the same clock.
        error: why it failed, in a few words that are the same for all of a kind; None if it didn't.
        message: what was said of it.
    """

    arrived: float
    input_len: int = 0
    output_len: int = 0
    times: list[float] = field(default_factory=list)
    error: str | None = None
    message: str = ""

    @property
    def ended(self) -> float:
        """When the last token came."""
        return self.times[-1]

    @property
    def ttft(self) -> float:
        """Seconds to the first token, waiting included."""
        return self.times[0] - self.arrived

    @property
    def itls(self) -> list[float]:
        """Seconds between one token and the next; with the first they add up to the whole."""
        return [after - before for before, after in pairwise(self.times)]

    @property
    def e2el(self) -> float:
        """Seconds to the last token."""
        return self.ended - self.arrived

    @property
    def tpot(self) -> float | None:
        """Mean seconds for each token after the first; None if there is none."""
        return (self.e2el - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None
