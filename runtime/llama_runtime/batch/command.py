"""A whole batch job: measure the prompts, load the model, run, say how it went."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llama_runtime.batch import report
from llama_runtime.batch.job import Job, Tally
from llama_runtime.batch.recipe import Recipe, Scan
from llama_runtime.batch.results import ResultFile
from llama_runtime.batch.rows import Source
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import CaravanError
from llama_runtime.generation_config import default_params
from llama_runtime.interrupts import last_act
from llama_runtime.llm import LLM
from llama_runtime.progress import Console
from llama_runtime.prompt_encoder import PromptEncoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the user asked of a job.

    Attributes:
        bundle: the bundle's directory.
        options: sampling options that replace the bundle's own, by name.
        chat: whether plain prompts become messages; None if the bundle has a template.
        allow_control_tokens: see ``LLM.chat``.
        max_batch: sequences that run at once, or "auto"; None takes the default of ``LLM``.
        max_len: the most tokens of one sequence; None takes the longest request of a file, and
            the default of ``LLM`` for a stream.
        threads: None takes the processors this process may use.
        devices: CUDA devices; None takes the default of ``LLM``.
        prefix_tokens: tokens of prompts that are kept; None takes the default of ``LLM``.
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


def run(source: Source, results: ResultFile, settings: Settings, console: Console) -> Tally:
    """Run a job.

    Args:
        source: the prompts.
        results: where the lines go; closed in the end.
        settings: what the user asked for.
        console: told what is going on.

    Returns:
        What became of the rows.

    Raises:
        CaravanError: the job can't start, or can't go on.
        KeyboardInterrupt: the user ended it; the lines written so far are whole and in order.
    """
    encoder = PromptEncoder(open_bundle(settings.bundle))
    defaults = default_params(encoder.bundle.generation_config)
    recipe = Recipe.of_job(
        encoder,
        defaults,
        settings.options,
        settings.chat,
        allow_control_tokens=settings.allow_control_tokens,
    )
    console.say(report.settings(recipe))
    max_len, total = settings.max_len, None
    if not source.is_stream:
        scan = _scan(source, recipe if max_len is None else None, console)
        max_len, total = max_len or scan.longest, scan.rows
    with source.open() as rows, _load(encoder, settings, max_len, console) as llm:
        job = Job(llm, recipe, results)
        started = time.monotonic()
        stopped = partial(report.stopped, results, total)
        try:
            with (
                last_act(lambda: "" if console.quiet else stopped()),
                console.status(report.Status(job.tally, llm.stats, total)),
            ):
                job.run(rows)
        except (CaravanError, KeyboardInterrupt):
            console.say(stopped())
            raise
        finally:
            results.close()
        console.say(report.summary(job.tally, time.monotonic() - started, results))
    return job.tally


def _scan(source: Source, recipe: Recipe | None, console: Console) -> Scan:
    scan = Scan()
    with (
        source.open(strict=True) as rows,
        console.status(lambda: [f"reading prompts: {scan.rows} rows"]),
    ):
        scan.read(rows, recipe)
    return scan


def _load(encoder: PromptEncoder, settings: Settings, max_len: int | None, console: Console) -> LLM:
    plan = LLM.plan(
        encoder,
        max_batch=settings.max_batch,
        max_len=max_len,
        devices=settings.devices,
        prefix_tokens=settings.prefix_tokens,
    )
    plan.check()
    console.say(plan.summary())
    with console.status(lambda: ["loading the model"]):
        llm = LLM(
            encoder,
            max_batch=settings.max_batch,
            max_len=max_len,
            threads=settings.threads,
            devices=settings.devices,
            prefix_tokens=settings.prefix_tokens,
        )
    numbers = ", ".join(map(str, settings.devices or [0]))
    where = f"devices {numbers}" if llm.threads is None else f"threads {llm.threads}"
    console.say(f"max_batch {llm.max_batch}, max_len {llm.max_len}, {where}")
    return llm
