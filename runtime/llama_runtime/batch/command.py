"""A whole batch job: look at the rows, load the model, run, say how it went."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llama_runtime.batch import report
from llama_runtime.batch.figures.statistics import Statistics
from llama_runtime.batch.figures.summary import now, summary, write
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.job import Job
from llama_runtime.batch.job_folder import JobFolder
from llama_runtime.batch.preparation import prepared
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.rows.scan import Scan
from llama_runtime.batch.rows.source import Source
from llama_runtime.batch.runners.places import check_memory, places
from llama_runtime.batch.runners.ray_runner import RayRunner
from llama_runtime.batch.runners.runner import LocalRunner, RowRunner
from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.batch.runners.workers import WorkerPool
from llama_runtime.batch.settings import Settings
from llama_runtime.batch.work import Work
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import CaravanError, RequestError
from llama_runtime.generation_config import default_params
from llama_runtime.interrupts import last_act
from llama_runtime.llm import LLM
from llama_runtime.loading import runs_on_gpu, runs_on_tensorrt
from llama_runtime.memory_plan import MemoryPlan
from llama_runtime.progress import Console
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.settings import DEFAULT_MAX_BATCH

# Finished results that may wait for an earlier one, for each slot. When that many do, no new row is
# begun until the one they wait for is done.
WAITING_PER_SLOT = 8


def run(source: Source, output: Path | None, settings: Settings, console: Console) -> bool:
    """Run a job, go on with one, or verify one.

    Args:
        source: the rows.
        output: where the lines go; None for standard output.
        settings: what the user asked for.
        console: told what is going on.

    Returns:
        Whether all rows went well; or whether the results are those of the rows.

    Raises:
        CaravanError: the job can't start, or can't go on.
        KeyboardInterrupt: the user ended it; the lines written so far are whole.
    """
    encoder = PromptEncoder(open_bundle(settings.bundle))
    recipe = Recipe.of_job(
        encoder,
        default_params(encoder.bundle.generation_config),
        settings.options,
        settings.chat,
        allow_control_tokens=settings.allow_control_tokens,
    )
    console.say(report.settings(recipe))
    on_gpu = runs_on_gpu(encoder.bundle)

    def check(scan: Scan) -> None:
        if settings.ray is not None:
            return  # each worker looks at the memory of its own machine
        plan = _plan(encoder, settings, scan.longest, scan.rows)
        check_memory(plan, settings.workers, on_gpu=on_gpu)

    with prepared(source, output, recipe, settings, console, check) as work:
        if settings.verify:
            return _verify(work, console)
        work.recover(console)
        if work.has_rows_left or (settings.retry_errors and work.statistics.failed):
            _run(work, encoder, settings, console)
        else:
            if settings.report is not None:
                write(_kept_summary(work, encoder, settings), None, settings.report)
            console.say(f"nothing is left to do; results in {work.ledger.output}")
        return work.statistics.failed == 0


def _run(work: Work, encoder: PromptEncoder, settings: Settings, console: Console) -> None:
    """Run what isn't done, and what is to be done again."""
    began = now()
    with _runner(work, encoder, settings, console) as runner:

        def summarise() -> None:
            about = {**_about(work, encoder, settings), "started": began, "ended": now()}
            found = summary(work.statistics, about, runner.about)
            write(found, work.folder, settings.report)

        try:
            if work.has_rows_left:
                _run_rows(work, runner, console)
            if settings.retry_errors and work.statistics.failed and work.folder is not None:
                _run_again(work, work.folder, runner, console)
        except BaseException:
            with suppress(CaravanError):  # a full disk has no room for it either
                summarise()
            raise
        summarise()


def _about(work: Work, encoder: PromptEncoder, settings: Settings) -> dict[str, object]:
    """What the job is asked to do."""
    return {
        "bundle": encoder.bundle.manifest.name,
        "input": work.name,
        "output": str(work.ledger.output),
        "options": dict(settings.options),
    }


def _kept_summary(work: Work, encoder: PromptEncoder, settings: Settings) -> dict[str, Any]:
    """How a job went that is done; the run that ended it may have died before it could say so."""
    kept = None if work.folder is None else work.folder.read_summary()
    if kept is not None and kept["statistics"]["rows"] == work.statistics.rows:
        return kept
    return summary(work.statistics, _about(work, encoder, settings), {})


def _run_rows(work: Work, runner: RowRunner, console: Console) -> None:
    work.ledger.window = WAITING_PER_SLOT * runner.num_slots
    job = Job(work.ledger, work.statistics, work.folder, lambda: runner.stats().running)
    stopped = partial(report.stopped, work.ledger, work.total, can_resume=work.folder is not None)
    before, started = (work.statistics.rows, work.statistics.completion_tokens), time.monotonic()
    try:
        with (
            work.records() as records,
            last_act(lambda: "" if console.quiet else stopped()),
            console.status(report.Status(work.statistics, runner, work.total)),
        ):
            job.run(runner, records)
    except (CaravanError, KeyboardInterrupt) as error:
        console.say(stopped())
        if isinstance(error, RequestError):  # rows that end too early: others were run
            raise CaravanError(str(error)) from error
        raise
    seconds = time.monotonic() - started
    console.say(report.summary(work.statistics, before, seconds, work.ledger))


def _run_again(work: Work, folder: JobFolder, runner: RowRunner, console: Console) -> None:
    """Run the rows that failed, and put the new results in the place of the old ones."""
    failed, statistics = work.ledger.failed, Statistics()
    console.say(f"running the {len(failed):,} rows again that failed")
    ledger = Ledger(work.form, folder.retries, ordered=False)
    job = Job(ledger, statistics, None, lambda: runner.stats().running)
    try:
        with (
            work.records() as records,
            last_act(lambda: "" if console.quiet else "stopped: the same command goes on"),
            console.status(report.Status(statistics, runner, len(failed))),
        ):
            job.run(runner, (record for record in records if record.index in failed))
    finally:
        ledger.close()
    work.merge_retries(console)
    console.say(report.retried(statistics, work.ledger))


@contextmanager
def _runner(
    work: Work, encoder: PromptEncoder, settings: Settings, console: Console
) -> Iterator[RowRunner]:
    """What runs the rows: this process, or several."""
    max_len = settings.max_len or (None if work.scan is None else work.scan.longest)
    on_gpu = runs_on_gpu(encoder.bundle)
    if settings.ray is None:
        plan = _plan(encoder, settings, max_len, work.total)
        check_memory(plan, settings.workers, on_gpu=on_gpu)
        console.say(plan.summary())
    spec = WorkerSpec(
        bundle=str(settings.bundle.absolute()),
        kind=work.kind,
        options={**settings.options, "seed": work.recipe.params.seed},
        chat=work.recipe.chat,
        allow_control_tokens=settings.allow_control_tokens,
        max_batch=_max_batch(encoder, settings, work.total),
        max_len=max_len,
        threads=settings.threads,
        devices=None if settings.devices is None else list(settings.devices),
        prefix_tokens=settings.prefix_tokens,
    )
    if settings.ray is not None:
        with _on_ray(spec, settings.ray, work, settings, console) as ray_runner:
            yield ray_runner
        return
    if settings.workers == 1:
        with console.status(lambda: ["loading the model"]):
            llm = spec.model(encoder)
        with llm:
            runner = LocalRunner(llm, work.form)
            console.say(report.set_up(runner, settings.devices))
            yield runner
        return
    shares = places(spec, settings.workers, on_gpu=on_gpu)
    with console.status(lambda: [f"loading the model {settings.workers} times"]):
        pool = WorkerPool(shares, work.form)
    try:
        console.say(report.set_up(pool, settings.devices))
        yield pool
        if pool.num_deaths:
            console.say(f"processes that died and were started again: {pool.num_deaths}")
    finally:
        pool.close()


@contextmanager
def _on_ray(
    spec: WorkerSpec, address: str, work: Work, settings: Settings, console: Console
) -> Iterator[RayRunner]:
    if work.folder is None:
        raise RequestError(
            "--ray needs a folder for the rows that aren't done, beside the results: give --output "
            "a file that all nodes see",
            param="ray",
        )
    with console.status(lambda: [f"looking for Ray at {address}"]):
        runner = RayRunner(
            spec,
            address=address,
            num_workers=settings.workers,
            shards=work.folder.path / "shards",
            ordered=not settings.unordered,
        )
    try:
        console.say(report.set_up(runner, settings.devices))
        yield runner
    finally:
        runner.close()


def _verify(work: Work, console: Console) -> bool:
    """Say whether the results are those of the rows."""
    with work.records() as records, console.status(lambda: ["comparing rows and results"]):
        verdict = work.verify(records)
    for line in report.verdict(verdict, work.ledger):
        console.say(line)
    return verdict.num_faults == 0


def _max_batch(
    encoder: PromptEncoder, settings: Settings, total: int | None
) -> int | Literal["auto"] | None:
    """Sequences that run at once: found while the job runs, unless that can't pay or can't be."""
    if settings.max_batch is not None or settings.workers > 1 or settings.ray is not None:
        return settings.max_batch
    if total is not None and total <= DEFAULT_MAX_BATCH:
        return None
    bundle = encoder.bundle
    return None if runs_on_gpu(bundle) and runs_on_tensorrt(bundle) else "auto"


def _plan(
    encoder: PromptEncoder, settings: Settings, max_len: int | None, total: int | None
) -> MemoryPlan:
    return LLM.plan(
        encoder,
        max_batch=_max_batch(encoder, settings, total),
        max_len=settings.max_len or max_len,
        devices=settings.devices,
        prefix_tokens=settings.prefix_tokens,
    )
