"""Which runner a job gets: this process, several, or a cluster; and whether it fits into memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from llama_runtime.batch import report
from llama_runtime.batch.runners.places import check_memory, places
from llama_runtime.batch.runners.ray_runner import RayRunner
from llama_runtime.batch.runners.runner import LocalRunner, RowRunner
from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.batch.runners.workers import WorkerPool
from llama_runtime.batch.settings import Settings
from llama_runtime.batch.work import Work
from llama_runtime.errors import RequestError
from llama_runtime.llm import LLM
from llama_runtime.loading import runs_on_gpu, runs_on_tensorrt
from llama_runtime.memory_plan import MemoryPlan
from llama_runtime.progress import Console
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.settings import DEFAULT_MAX_BATCH


def checked_plan(
    encoder: PromptEncoder, settings: Settings, longest: int | None, total: int | None
) -> MemoryPlan | None:
    """What each process of a job needs of memory, which is there.

    Args:
        encoder: the text side of the bundle.
        settings: what the user asked for.
        longest: tokens of the longest row; None if that isn't known.
        total: how many rows there are; None if that isn't known.

    Returns:
        The plan; None on a cluster, where each worker looks at the memory of its own machine.

    Raises:
        CapacityError: it doesn't fit.
    """
    if settings.ray is not None:
        return None
    plan = LLM.plan(
        encoder,
        max_batch=_max_batch(encoder, settings, total),
        max_len=settings.max_len or longest,
        devices=settings.devices,
        prefix_tokens=settings.prefix_tokens,
    )
    check_memory(plan, settings.workers, on_gpu=runs_on_gpu(encoder.bundle))
    return plan


@contextmanager
def chosen_runner(
    work: Work, encoder: PromptEncoder, settings: Settings, console: Console
) -> Iterator[RowRunner]:
    """What runs the rows of a job, ready, until the block ends.

    Args:
        work: what there is to do.
        encoder: the text side of the bundle.
        settings: what the user asked for.
        console: told what is going on.

    Raises:
        CaravanError: it doesn't fit into memory, or can't start.
    """
    longest = None if work.scan is None else work.scan.longest
    plan = checked_plan(encoder, settings, longest, work.total)
    if plan is not None:
        console.say(plan.summary())
    spec = WorkerSpec(
        bundle=str(settings.bundle.absolute()),
        kind=work.kind,
        options={**settings.options, "seed": work.recipe.params.seed},
        chat=work.recipe.chat,
        allow_control_tokens=settings.allow_control_tokens,
        max_batch=_max_batch(encoder, settings, work.total),
        max_len=settings.max_len or longest,
        threads=settings.threads,
        devices=None if settings.devices is None else list(settings.devices),
        prefix_tokens=settings.prefix_tokens,
    )
    if settings.ray is not None:
        running = _on_ray(spec, settings.ray, work, settings, console)
    elif settings.workers > 1:
        running = _in_processes(spec, encoder, work, settings, console)
    else:
        running = _in_this_process(spec, encoder, work, console)
    with running as runner:
        console.say(report.set_up(runner, settings.devices))
        yield runner


@contextmanager
def _in_this_process(
    spec: WorkerSpec, encoder: PromptEncoder, work: Work, console: Console
) -> Iterator[RowRunner]:
    with console.status(lambda: ["loading the model"]):
        llm = spec.model(encoder)
    with llm:
        yield LocalRunner(llm, work.form)


@contextmanager
def _in_processes(
    spec: WorkerSpec, encoder: PromptEncoder, work: Work, settings: Settings, console: Console
) -> Iterator[RowRunner]:
    shares = places(spec, settings.workers, on_gpu=runs_on_gpu(encoder.bundle))
    with console.status(lambda: [f"loading the model {settings.workers} times"]):
        pool = WorkerPool(shares, work.form)
    try:
        yield pool
        if pool.num_deaths:
            console.say(f"processes that died and were started again: {pool.num_deaths}")
    finally:
        pool.close()


@contextmanager
def _on_ray(
    spec: WorkerSpec, address: str, work: Work, settings: Settings, console: Console
) -> Iterator[RowRunner]:
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
        yield runner
    finally:
        runner.close()


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
