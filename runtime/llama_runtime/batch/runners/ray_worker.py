"""What runs on the nodes of a Ray cluster: a model each, and the rows of a job."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from llama_runtime import __version__
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.runners.ray_tables import (
    Piece,
    failure_table,
    outcome_table,
)
from llama_runtime.batch.runners.runner import LocalRunner
from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.errors import CaravanError
from llama_runtime.manifest import MANIFEST

if TYPE_CHECKING:
    import pyarrow

# How often the rows of a piece are begun. One that kills its worker would be run for ever
# otherwise; and so many deaths by chance, in the minutes that a piece takes, don't happen.
MOST_TRIES = 8
CALLS_AT_ONCE = 2  # pieces that a worker runs: while the last rows of one end, the other has more


def manifest_hash(bundle: Path) -> str | None:
    """SHA-256 of a bundle's manifest, which holds that of every other file; None if it has none."""
    try:
        return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


class BatchRunner:
    """Loads a model once and runs pieces of the rows; several at a time, if threads call it.

    It gives tables and not arrays of numpy, which know no missing texts and cut bytes at zeros. It
    raises nothing: what keeps the worker from running is an answer, which ends the job with a
    sentence. So Ray, which runs again what has raised, can't go round in circles.

    Args:
        spec: a ``WorkerSpec`` as JSON.
        version: of the Caravan that the job runs with.
        manifest: ``manifest_hash`` of the bundle there.
    """

    def __init__(self, spec: str, version: str, manifest: str | None) -> None:
        self._failure: str | None = None
        try:
            self._load(WorkerSpec.from_json(spec), version, manifest)
        except CaravanError as error:
            self._failure = f"the worker on {platform.node()} can't start: {error}"

    def __call__(self, pieces: pyarrow.Table) -> pyarrow.Table:
        """Run the rows of pieces.

        Args:
            pieces: the attributes of ``Piece`` as columns.

        Returns:
            See ``outcome_table``: in the order of the rows, so that running them twice gives the
            same table. Or ``failure_table``.
        """
        outcomes: list[Outcome] = []
        try:
            if self._failure is None:
                for piece in pieces.to_pylist():
                    outcomes += self._run(Piece(**piece))
        except CaravanError as error:
            self._failure = f"the worker on {platform.node()} has failed: {error}"
        if self._failure is not None:
            return failure_table(self._failure)
        return outcome_table(outcomes)

    def _run(self, piece: Piece) -> list[Outcome]:
        records = piece.read()
        if piece.note_try() >= MOST_TRIES:
            lines = f"{records[0].line.number:,} to {records[-1].line.number:,}"
            raise CaravanError(
                f"the rows of lines {lines} were begun {MOST_TRIES} times, and their worker died "
                "each time: one of them may kill it. On one machine, without --ray, --workers 2 "
                "finds out which, reports it and goes on"
            )
        outcomes: list[Outcome] = []
        LocalRunner(self._llm, self._form).run(iter(records), lambda: True, outcomes.append)
        return sorted(outcomes, key=lambda outcome: outcome.index)

    def _load(self, spec: WorkerSpec, version: str, manifest: str | None) -> None:
        if version != __version__:
            raise CaravanError(
                f"Caravan {__version__} is installed there, and the job runs with {version}: "
                "install the same on all nodes"
            )
        found = manifest_hash(Path(spec.bundle))
        if found is None:
            raise CaravanError(
                f"there is no bundle at {spec.bundle}: it must be at the same path on all nodes"
            )
        if found != manifest:
            raise CaravanError(
                f"the bundle at {spec.bundle} is another one there: all nodes must have the same"
            )
        self._llm, self._form = spec.load()
