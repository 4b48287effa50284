"""The options of ``llama-run batch``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import click

from llama_runtime.cli_options import (
    control_tokens_option,
    generation_options,
    given,
    max_batch_option,
    prefix_tokens_option,
)
from llama_runtime.cli_types import FILE
from llama_runtime.command_line import FAILED, examples
from llama_runtime.errors import RequestError
from llama_runtime.progress import Console


@click.command(
    epilog=examples(
        "llama-run batch prompts.txt",
        "llama-run batch questions.jsonl --max-tokens 64 --temperature 0.7 --seed 1",
        "llama-run batch requests.jsonl.gz --output answers.jsonl --report job.html",
        "llama-run batch requests.jsonl.gz --output answers.jsonl --retry-errors",
        "cat prompts.txt | llama-run batch - --quiet > results.jsonl",
    )
)
@click.argument("file")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="Where the results go, and what it takes to go on; - is standard output, which keeps "
    "nothing.  [default: FILE with its ending replaced by "
    ".results.jsonl; standard output for standard input]",
)
@click.option("--force", is_flag=True, help="Begin anew where there are results already.")
@click.option("--unordered", is_flag=True, help="Write results as rows end, not in their order.")
@click.option(
    "--no-spool",
    is_flag=True,
    help="Answer the rows of a stream as they come and keep none: the job can't be resumed.",
)
@click.option(
    "--workers",
    metavar="N",
    type=click.IntRange(1, 1024),
    default=1,
    help="Processes, each with a model: one for each device, or each group of processors.  "
    "[default: 1]",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Run the workers on a Ray cluster: HOST:PORT of its head node, auto or local. Bundle and "
    "output must be at the same paths on all nodes.",
)
@click.option("--retry-errors", is_flag=True, help="Run the rows again that failed.")
@click.option(
    "--verify",
    is_flag=True,
    help="Compare finished results with the rows: each once, in its place. Nothing is run.",
)
@click.option(
    "--report",
    metavar="FILE",
    type=FILE,
    help="Write a page of HTML about the job: throughput, lengths, latency.",
)
@generation_options
@control_tokens_option
@max_batch_option
@click.option(
    "--max-len",
    metavar="N",
    type=click.IntRange(min=1),
    help="The most tokens of a prompt and its completion; a longer row fails.  [default: that of "
    "the longest row; for standard input what fits of the model's limit, at most 4096]",
)
@prefix_tokens_option
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def batch(
    file: str,
    output: str | None,
    force: bool,
    unordered: bool,
    no_spool: bool,
    workers: int,
    ray: str | None,
    retry_errors: bool,
    verify: bool,
    report: Path | None,
    bundle: Path,
    chat: bool | None,
    threads: int | None,
    devices: list[int] | None,
    allow_control_tokens: bool,
    max_batch: int | Literal["auto"] | None,
    max_len: int | None,
    prefix_tokens: int | None,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Complete every row of FILE. Interrupted, the same command goes on.

    FILE is text with a prompt a line (.txt), JSON with an object a line (.jsonl), requests of
    OpenAI's Batch API, or a parquet file; what it is, and whether it is compressed by gzip, is told
    by what is in it. "-" is standard input. An object has "prompt" (a text) or "messages" (a list
    of {"role", "content"}), and if wanted "id" and any of the options below that say how it is
    continued, as max_tokens, top_p, stop, logit_bias and so on, which go before those given here.
    Blank lines are skipped and don't count.

    The results are one JSON object a line, in the order of the rows: index (from 0), id, prompt,
    text, token_ids, finish_reason (stop, length or error), usage, seed, error; stop_text, logprobs
    and prompt_logprobs where they are asked for. With -n above 1, "samples" holds what belongs to
    each. Requests of OpenAI's API have the results of that API, and errors a file of their own. A
    row that can't run says why in "error", and the others go on. A row run alone with its seed
    gives the same text.

    OUTPUT.job holds what it takes to go on: rows that are done stay done, a line that was cut off
    is done again, and other rows, another bundle or other options are refused. It also keeps the
    rows of standard input, and a summary.json.

    With --seed, each row gets a seed of its own, made from this one and the row's index.

    Exit status: 0 all rows went well, 1 some failed or the job can't go on, 2 wrong use, 130 and
    143 interrupted; what is written by then is whole.
    """
    if verify and (force or retry_errors or report is not None):
        raise RequestError(
            "--verify runs nothing: leave --force, --retry-errors and --report out", param="verify"
        )
    from llama_runtime.batch.command import run
    from llama_runtime.batch.results.destination import check_report, destination
    from llama_runtime.batch.rows.source import Source
    from llama_runtime.batch.settings import Settings

    source = Source.named(file)
    path = destination(source, output)
    if report is not None:
        check_report(report, source, path)
    settings = Settings(
        bundle=bundle,
        options=given(sampling),
        chat=chat,
        allow_control_tokens=allow_control_tokens,
        max_batch=max_batch,
        max_len=max_len,
        threads=threads,
        devices=devices,
        prefix_tokens=prefix_tokens,
        unordered=unordered,
        spool=not no_spool,
        force=force,
        workers=workers,
        ray=ray,
        retry_errors=retry_errors,
        verify=verify,
        report=report,
    )
    mixed = path is None and sys.stdout.isatty()
    console = Console(sys.stderr, quiet=quiet, with_status=not mixed)
    if not run(source, path, settings, console):
        click.get_current_context().exit(FAILED)
