"""What the user asks of a batch job."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked of a job.

    Attributes:
        bundle: the bundle's directory.
        options: sampling options that replace the bundle's own, by name.
        chat: whether plain prompts become messages; None if the bundle has a template.
        allow_control_tokens: see ``LLM.chat``.
        max_batch: sequences that run at once, or "auto"; None finds it as "auto" does, where that
            can pay.
        max_len: the most tokens of one sequence; None takes the longest request of a file, and
            the default of ``LLM`` for a stream.
        threads: None takes the processors this process may use.
        devices: CUDA devices; None takes the default of ``LLM``.
        prefix_tokens: tokens of prompts that are kept; None takes the default of ``LLM``.
        unordered: whether results are written as rows end.
        spool: whether a stream is kept in a file first, so that the job can be resumed.
        force: whether to begin anew where there are results.
        workers: processes that run rows, each with a model.
        ray: address of a Ray cluster on which they run; None for this machine.
        retry_errors: whether rows that failed are run again.
        verify: whether finished results are compared with their rows, and nothing is run.
        report: where an HTML page about the job goes; None for none.
    """

    bundle: Path
    options: Mapping[str, Any]
    chat: bool | None = None
    allow_control_tokens: bool = False
    max_batch: int | Literal["auto"] | None = None
    max_len: int | None = None
    threads: int | None = None
    devices: Seq[int] | None = None
    prefix_tokens: int | None = None
    unordered: bool = False
    spool: bool = True
    force: bool = False
    workers: int = 1
    ray: str | None = None
    retry_errors: bool = False
    verify: bool = False
    report: Path | None = None
