"""A job before its model is loaded: what there is to do, and what of it is done already."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llama_runtime.batch.forms.form import form_of
from llama_runtime.batch.forms.formats import Format
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.identity import bundle_hash, check_same
from llama_runtime.batch.job_folder import JobFolder, errors_path
from llama_runtime.batch.results.destination import can_resume, check_unused
from llama_runtime.batch.results.ledger import Ledger
from llama_runtime.batch.rows.scan import Scan
from llama_runtime.batch.rows.source import Kind, Rows, Source
from llama_runtime.batch.rows.spool import Spool
from llama_runtime.batch.settings import Settings
from llama_runtime.batch.work import Work, records_of
from llama_runtime.errors import RequestError
from llama_runtime.memory_plan import megabytes
from llama_runtime.params import fresh_seed
from llama_runtime.progress import Console


@contextmanager
def prepared(
    source: Source,
    output: Path | None,
    recipe: Recipe,
    settings: Settings,
    console: Console,
    check_memory: Callable[[Scan], None],
) -> Iterator[Work]:
    """Find out what there is to do.

    Args:
        source: where the rows come from.
        output: the result file; None for standard output.
        recipe: how rows become requests.
        settings: what the user asked.
        console: told what is going on.
        check_memory: given what a first look found, raises if the model wouldn't fit; called before
            results of an earlier job are removed.

    Raises:
        CaravanError: the job can't run.
    """
    with ExitStack() as stack:
        if output is not None and can_resume(output) and (settings.spool or not source.is_stream):
            work = _resumable(stack, source, output, recipe, settings, console, check_memory)
        else:
            work = _single(stack, source, output, recipe, settings, console)
        stack.callback(work.ledger.close)
        yield work


class _Opened:
    """Rows that are open already, and can't be opened again."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __call__(self) -> AbstractContextManager[Rows]:
        return nullcontext(self._rows)


def _single(
    stack: ExitStack,
    source: Source,
    output: Path | None,
    recipe: Recipe,
    settings: Settings,
    console: Console,
) -> Work:
    """A job that keeps nothing but its results."""
    if settings.verify or settings.retry_errors:
        raise RequestError(
            "results that are not kept in a file beside their job can't be verified, nor errors "
            "retried: give --output a file",
            param="verify" if settings.verify else "retry_errors",
        )
    if output is not None and can_resume(output):
        if not settings.force:
            check_unused(output)  # before a row is waited for
        console.say(
            f"{source} is not kept: the job can't be resumed, and ids that come twice go unnoticed"
        )
    opened: Callable[[], AbstractContextManager[Rows]] = source.open
    if source.is_stream:
        rows = stack.enter_context(source.open())
        kind, opened, scan = rows.kind, _Opened(rows), None
        form = form_of(kind, recipe, settings.options)
    else:
        with source.open() as looked_at:
            kind = looked_at.kind
        form = form_of(kind, recipe, settings.options)
        with tempfile.TemporaryDirectory() as scratch:
            scan = _scanned(source, form, Path(scratch, "ids.sqlite"), settings, console)
    apart = form.errors_apart and output is not None and can_resume(output)
    errors = errors_path(output) if apart and output is not None else None
    for path in (output, errors):
        if path is not None and can_resume(path):
            if settings.force:
                path.unlink(missing_ok=True)
            check_unused(path)
    ledger = Ledger(form, output, errors, ordered=not settings.unordered)
    return Work(
        str(source), opened, kind, recipe, form, scan, ledger, None, ordered=not settings.unordered
    )


def _resumable(
    stack: ExitStack,
    source: Source,
    output: Path,
    recipe: Recipe,
    settings: Settings,
    console: Console,
    check_memory: Callable[[Scan], None],
) -> Work:
    """A job that can go on after an interruption, or one that does."""
    folder = JobFolder(output)
    if not settings.force and folder.read() is None:
        check_unused(output)
        if settings.verify or settings.retry_errors:
            raise RequestError(f"there is no job of {output} yet", param="output")
    stack.enter_context(folder.locked())
    begun = None if settings.force else folder.read()
    if source.is_stream:
        stack.callback(folder.new_input.unlink, missing_ok=True)
        source = _spooled(source, folder, console, anew=begun is None)
    with source.open() as rows:
        kind = rows.kind
    form = form_of(kind, recipe, settings.options)
    stamp = source.stamp()
    identity = _identity(source, kind, recipe, settings)
    if begun is not None:
        check_same(begun["identity"], identity, output)
        scan, seed = Scan(**begun["scan"]), begun["seed"]
    else:
        scan = _scanned(source, form, folder.index, settings, console)
        check_memory(scan)
        results = [output, folder.errors] if form.errors_apart else [output]
        if not settings.force:
            for path in results:
                check_unused(path)
        folder.clear(results)
        if source.path == folder.new_input:
            source = Source(folder.input, name=str(source))
        seed = fresh_seed()  # kept, so that rows draw the same numbers whenever they run
        folder.write({"identity": identity, "scan": scan.to_dict(), "seed": seed})
    recipe = recipe.seeded(seed)
    form = form_of(kind, recipe, settings.options)
    errors = folder.errors if form.errors_apart else None
    ordered = not settings.unordered
    ledger = Ledger(form, output, errors, ordered=ordered, journal=folder.ahead)
    given = identity["input"]
    return Work(
        str(source),
        source.open,
        kind,
        recipe,
        form,
        scan,
        ledger,
        folder,
        ordered=ordered,
        has_changed=lambda: source.stamp() != stamp and source.fingerprint() != given,
    )


def _spooled(source: Source, folder: JobFolder, console: Console, *, anew: bool) -> Source:
    spool = Spool(source, folder.new_input if anew else folder.input)
    with (
        console.status(lambda: [f"keeping {source}: {megabytes(spool.num_bytes)}"]),
        source.stream() as stream,
    ):
        return spool.copied(stream, anew=anew)


def _scanned(
    source: Source, form: Format, index: Path, settings: Settings, console: Console
) -> Scan:
    scan = Scan()
    with source.open() as rows, console.status(lambda: [f"reading rows: {scan.rows:,}"]):
        scan.read(records_of(rows), form, index, measure=settings.max_len is None)
    return scan


def _identity(source: Source, kind: Kind, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    if source.path is None:
        raise RequestError(f"{source} can't be read twice", param="file")
    identity = {
        "input": source.fingerprint(),
        "format": kind,
        "bundle": bundle_hash(recipe.encoder.bundle),
        "options": dict(settings.options),
        "chat": recipe.chat,
        "allow_control_tokens": settings.allow_control_tokens,
        "max_len": settings.max_len,
        "unordered": settings.unordered,
    }
    found: dict[str, Any] = json.loads(json.dumps(identity))  # as it is read back
    return found
