"""The command ``llama-run eval``: measure a bundle, and say what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

from llama_runtime.bundle import Bundle
from llama_runtime.evaluation.report import QualityReport
from llama_runtime.evaluation.scoring import evaluate
from llama_runtime.progress import Console, duration


def run(
    bundle: Bundle, console: Console, *, threads: int | None = None, limit: int | None = None
) -> QualityReport:
    """Measure a bundle.

    Args:
        bundle: see ``scoring.evaluate``.
        console: told what is going on.
        threads: see there.
        limit: see there.

    Raises:
        CaravanError: it can't be measured; see ``scoring.evaluate``.
    """
    from llama_runtime.evaluation.texts import texts_sha256

    done = total = 0
    started = time.monotonic()

    def progress(tokens: int, of: int) -> None:
        nonlocal done, total
        done, total = tokens, of

    def parts() -> Sequence[str]:
        spent = time.monotonic() - started
        shown = [f"{done:,} of {total:,} tokens" if total else "loading"]
        if done:
            shown.append(f"{duration(spent / done * (total - done))} left")
        return shown

    with console.status(parts):
        report = evaluate(bundle, threads=threads, limit=limit, progress=progress)
    if report.texts_sha256 != texts_sha256():
        console.say(
            "the bundle was built with other evaluation texts than this version of Caravan has: "
            "compare its figures only with those of bundles from the same version"
        )
    return report


def as_text(name: str, report: QualityReport) -> str:
    """The report for people: what was measured, the table, the verdict."""
    return (
        f"{name}, {report.precision} against its fp32 source\n\n{report.table()}\n"
        f"{report.verdict()}\n"
    )


def as_json(report: QualityReport) -> str:
    """The report for programs, on one line."""
    gate = report.gate
    limits = None
    if gate is not None:
        limits = {key: value for key, value in asdict(gate).items() if key != "instead"}
    found = {
        "precision": report.precision,
        **report.as_dict(),
        "gate": limits,
        "passed": report.passed,
    }
    return json.dumps(found, ensure_ascii=False) + "\n"
