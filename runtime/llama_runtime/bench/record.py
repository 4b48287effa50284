"""What ``llama-run bench`` writes: one object of JSON, a line of CSV for each run.

The object has "tool", "caravan", "date", "machine" and what was asked; "limits" of the machine, or
None; "notes", sentences to read before the figures; and "runs". A run has the figures of vLLM's
``bench serve`` under their names there, and what is our own: "strategy", "batch_size",
"bandwidth_share", "compute_share", "peak_memory_bytes", "occupancy".
"""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

from llama_runtime import __version__
from llama_runtime.errors import CaravanError
from llama_runtime.machine import default_threads

MOST_SAMPLES = 240  # of what changes over time: as many as a chart can show

Record = dict[str, Any]


def about(tool: str, **facts: object) -> Record:
    """What was measured, where and when."""
    return {
        "tool": tool,
        "caravan": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": _processor(),
            "processors": default_threads(),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        **facts,
    }


def _processor() -> str:
    """As its maker calls it, where the system says so."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def thinned(samples: Seq[tuple[float, int]], most: int = MOST_SAMPLES) -> list[list[float]]:
    """A few samples instead of many: each the mean of its part of the time.

    Args:
        samples: seconds at which a step ended, and what was counted in it.
        most: how many may be left.

    Returns:
        [seconds, value]: the end of each part and its mean, weighed by time.
    """
    if not samples or samples[-1][0] <= 0:
        return []
    span = samples[-1][0]
    parts = min(most, len(samples))
    found = []
    index, at = 0, 0.0
    for part in range(1, parts + 1):
        border = span * part / parts if part < parts else span
        total, began = 0.0, at
        while at < border:
            end, value = samples[index]
            until = min(end, border)
            total += value * max(0.0, until - at)
            at = max(at, until)
            if end <= border and index < len(samples) - 1:
                index += 1
        found.append([round(border, 6), round(total / max(border - began, 1e-9), 4)])
    return found


def as_json(record: Mapping[str, Any]) -> str:
    """The text of the JSON file."""
    return json.dumps(record, indent=2, allow_nan=False) + "\n"


def as_csv(runs: Seq[Mapping[str, Any]]) -> str:
    """A line for each run, of all that is one value; errors by kind as JSON."""
    names = list(
        dict.fromkeys(
            name for run in runs for name, value in run.items() if not isinstance(value, list)
        )
    )
    text = StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(names)
    for run in runs:
        lines.writerow([_cell(run.get(name)) for name in names])
    return text.getvalue()


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, Mapping) else value


def write_text(path: Path, text: str) -> None:
    """Write a whole file of text, in UTF-8; see ``write_bytes``."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, or none: it is written beside its place and moved there.

    What is no plain file, such as ``/dev/stdout``, is written to as it is.

    Raises:
        CaravanError: it can't be written.
    """
    special = path.exists() and not path.is_file()
    beside = path if special else path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        if not special:
            os.replace(beside, path)
    except OSError as error:
        if not special:
            beside.unlink(missing_ok=True)
        raise CaravanError(f"can't write to {path}: {error.strerror or error}") from error
