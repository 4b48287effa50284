"""What became of one row of a batch job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row.

    Attributes:
        index: of the row, from 0.
        line: the result line as bytes, with its line end.
        error: why the row failed, as a sentence, or None.
        prompt_tokens: 0 if the row never ran.
        completion_tokens: of all its completions together.
        finish_reasons: one a completion: "stop", "length" or "error".
        seconds: from when the row was taken up until it ended; None where an earlier run did it.
    """

    index: int
    line: bytes
    error: str | None
    prompt_tokens: int
    completion_tokens: int
    finish_reasons: tuple[str, ...]
    seconds: float | None
