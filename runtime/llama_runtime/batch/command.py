"""A whole batch job: look at the rows, load the model, run, say how it went."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

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
from llama_runtime.batch.runners.choice import checked_plan, chosen_runner
from llama_runtime.batch.runners.runner import RowRunner
from llama_runtime.batch.settings import Settings
from llama_runtime.batch.work import Work
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import CaravanError, RequestError
from llama_runtime.generation_config import default_params
from llama_runtime.interrupts import last_act
from llama_runtime.progress import Console
from llama_runtime.prompt_encoder import PromptEncoder

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

    def check(scan: Scan) -> None:
        checked_plan(encoder, settings, scan.longest, scan.rows)

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
    with chosen_runner(work, encoder, settings, console) as runner:

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


def _verify(work: Work, console: Console) -> bool:
    """Say whether the results are those of the rows."""
    with work.records() as records, console.status(lambda: ["comparing rows and results"]):
        verdict = work.verify(records)
    for line in report.verdict(verdict, work.ledger):
        console.say(line)
    return verdict.num_faults == 0
