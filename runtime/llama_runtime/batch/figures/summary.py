"""What is left of a job beside its results: ``summary.json``, and a page to look at."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llama_runtime import __version__
from llama_runtime.batch.figures.html_report import render
from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.errors import CaravanError


def now() -> str:
    """The time, as ISO text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def summary(
    statistics: Statistics, job: Mapping[str, Any], machine: Mapping[str, Any]
) -> dict[str, Any]:
    """What ``summary.json`` holds.

    Args:
        statistics: of the job.
        job: what it was asked to do, and when.
        machine: what it ran on, beside what is known of any process.
    """
    about = {
        "caravan": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        **machine,
    }
    return {"job": dict(job), "machine": about, "statistics": statistics.to_dict()}


def write(found: Mapping[str, Any], folder: JobFolder | None, page: Path | None) -> None:
    """Write both.

    Args:
        found: from ``summary``.
        folder: the job's; None keeps no ``summary.json``.
        page: where the page goes; None for nowhere.

    Raises:
        CaravanError: one of them can't be written.
    """
    if folder is not None:
        folder.write_summary(found)
    if page is not None:
        try:
            page.write_text(render(found), encoding="utf-8")
        except OSError as error:
            raise CaravanError(f"can't write to {page}: {error.strerror}") from error
