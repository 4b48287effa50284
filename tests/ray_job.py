"""A batch job on a Ray cluster, in a process that can be killed: ``python -m tests.ray_job``.

Arguments: the bundle, the prompts, the output, the address, and how many workers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.forms.form import form_of
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.job import Job
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.rows.source import Source
from llama_runtime.batch.runners.ray_runner import RayRunner
from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.batch.work import records_of
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import CaravanError
from llama_runtime.generation_config import default_params
from llama_runtime.prompt_encoder import PromptEncoder

MAX_LEN = 256
OPTIONS: dict[str, Any] = {
    "max_tokens": 120,
    "temperature": 0.0,
    "ignore_eos": True,
    "seed": 1,
}


def spec_of(bundle: Path) -> WorkerSpec:
    """What a worker loads."""
    return WorkerSpec(
        bundle=str(bundle.absolute()),
        kind="text",
        options=OPTIONS,
        chat=False,
        max_batch=2,
        max_len=MAX_LEN,
        threads=1,
    )


def main(bundle: Path, prompts: Path, output: Path, address: str, num_workers: int) -> None:
    """Run the job, or go on with it."""
    encoder = PromptEncoder(open_bundle(bundle))
    defaults = default_params(encoder.bundle.generation_config)
    form = form_of("text", Recipe.of_job(encoder, defaults, OPTIONS, False), OPTIONS)
    folder = JobFolder(output)
    with folder.locked():
        ledger = Ledger(form, output, journal=folder.ahead)
        for _ in ledger.recover(folder.read_progress()):
            pass
        shards = folder.path / "shards"
        runner = RayRunner(spec_of(bundle), address=address, num_workers=num_workers, shards=shards)
        try:
            with Source(prompts).open() as rows:
                Job(ledger, Statistics(), folder, lambda: 0).run(runner, records_of(rows))
        finally:
            runner.close()
            ledger.close()


if __name__ == "__main__":
    try:
        bundle, prompts, output = map(Path, sys.argv[1:4])
        main(bundle, prompts, output, sys.argv[4], int(sys.argv[5]))
    except CaravanError as error:
        sys.exit(f"error: {error}")
