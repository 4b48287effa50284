"""The options of ``llama-run bench``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llama_runtime.bench import STRATEGIES
from llama_runtime.bench.lengths import Lengths
from llama_runtime.cli_options import (
    bundle_option,
    devices_option,
    request_timeout_option,
    threads_option,
)
from llama_runtime.cli_types import FILE, ListOf, Rate
from llama_runtime.command_line import FAILED, examples
from llama_runtime.errors import RequestError
from llama_runtime.progress import Console

MAX_PROMPTS = 1_000_000
MAX_ROUNDS = 1000
MAX_AT_ONCE = 100_000
KEY = "LLAMA_RUN_API_KEY"
_LOCAL = ("bundle", "strategies", "batch_sizes", "threads", "devices")
_SERVED = (
    "endpoint",
    "model",
    "max_concurrency",
    "request_rate",
    "request_timeout",
    "api_key_file",
)
_USUAL: dict[str, Any] = {
    "batch_sizes": (1, 2, 4, 8, 16, 32),
    "input_lens": (Lengths(32, 128),),
    "output_lens": (Lengths(16, 64),),
    "num_prompts": 64,
    "rounds": 3,
}
_QUICK: dict[str, Any] = {
    "batch_sizes": (1, 4, 16),
    "input_lens": (Lengths(16, 64),),
    "output_lens": (Lengths(8, 32),),
    "num_prompts": 32,
    "rounds": 1,
}


def _strategy(text: str) -> str:
    if text not in STRATEGIES:
        raise ValueError(f"{text!r:.80} is none of {', '.join(STRATEGIES)}")
    return text


def _count(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= most:
            raise ValueError(f"{text!r:.80} is no whole number in 1 to {most:,}")
        return int(text)

    return parse


LENGTHS = ListOf("lengths", Lengths.parse)


@click.command(
    epilog=examples(
        "llama-run bench --quick",
        "llama-run bench --batch-sizes 1,8,32 --report bench.html --json bench.json",
        "llama-run bench --dataset-path sharegpt.json --strategies static,continuous",
        "llama-run bench --serve http://127.0.0.1:8000 --max-concurrency 1,8,32",
    )
)
@bundle_option
@click.option(
    "--strategies",
    metavar="NAME,NAME",
    type=ListOf("strategies", _strategy),
    default=",".join(STRATEGIES),
    help="Of sequential, concurrent, static and continuous.  [default: all]",
)
@click.option(
    "--batch-sizes",
    metavar="N,N",
    type=ListOf("sizes", _count(1024)),
    help="How many requests run at once, one after the other.  [default: 1,2,4,8,16,32]",
)
@click.option(
    "--input-len",
    "input_lens",
    metavar="N|N:N,...",
    type=LENGTHS,
    help="Prompt tokens: a number, or a range that each request draws from; several with commas "
    "are measured one after the other.  [default: 32:128]",
)
@click.option(
    "--output-len",
    "output_lens",
    metavar="N|N:N,...",
    type=LENGTHS,
    help="Completion tokens, in the same way.  [default: 16:64; with a data set, the replies']",
)
@click.option(
    "--num-prompts",
    metavar="N",
    type=click.IntRange(1, MAX_PROMPTS),
    help="Requests of a run.  [default: 64]",
)
@click.option(
    "--dataset-name",
    type=click.Choice(["synthetic", "sharegpt"]),
    help="Random prompts, or those of a file.  [default: sharegpt if --dataset-path is given]",
)
@click.option(
    "--dataset-path",
    metavar="FILE",
    type=FILE,
    help="Conversations in ShareGPT's form; the first question of each is asked.",
)
@click.option(
    "--seed",
    metavar="N",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    show_default=True,
    help="Of prompts, lengths and arrivals.",
)
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(1, MAX_ROUNDS),
    help="How often each run is made, in turns; the one in the middle counts.  [default: 3]",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A first look: 1, 4 and 16 at once, 32 short requests, one round, where nothing else is "
    "given.",
)
@threads_option
@devices_option
@click.option(
    "--serve", "url", metavar="URL", help="Measure this server instead, through OpenAI's API."
)
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="How the server is asked.",
)
@click.option("--model", metavar="NAME", help="The server's model.  [default: its first]")
@click.option(
    "--max-concurrency",
    metavar="N,N",
    type=ListOf("numbers", _count(MAX_AT_ONCE)),
    help="The most requests at once, one number after the other.  [default: all]",
)
@click.option(
    "--request-rate",
    metavar="X",
    type=Rate(),
    default="inf",
    show_default=True,
    help="Requests a second, as a Poisson process; inf asks all at once.",
)
@request_timeout_option
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=FILE,
    help=f"The server's key, the first line.  [default: {KEY} of the environment]",
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=FILE,
    help="Write all figures; - prints them in place of the table.",
)
@click.option("--csv", "csv_file", metavar="FILE", type=FILE, help="Write a line for each run.")
@click.option("--report", metavar="FILE", type=FILE, help="Write a page of HTML with charts.")
@click.option(
    "--plots",
    metavar="FOLDER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write the charts as files of SVG, and of PNG if llama-caravan[plots] is installed.",
)
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but the table.")
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    url: str | None,
    quick: bool,
    quiet: bool,
    json_file: Path | None,
    csv_file: Path | None,
    report: Path | None,
    plots: Path | None,
    **given: Any,
) -> None:
    """Measure throughput and latency of a bundle, or of a server.

    The same requests run by several strategies: one after the other (sequential); as many as there
    are slots, each stepped alone in turn, a run of the graph for each and every token (concurrent);
    in batches, of which the next begins when the last of the one before has ended (static); with
    each slot filled again in the next step (continuous, which is what all other commands do).
    Decoding is greedy and goes on past end tokens, so all give the same tokens; if they don't, it
    says so. Where one runs at a time all are sequential, and concurrent runs with the most slots
    only.

    All requests are there at the start, so the time to the first token (TTFT) includes waiting. ITL
    is the time from one token to the next, E2E that of a whole request. Of the machine's limits,
    which are measured first: "mem" is the bytes of weights that each run of the graph reads, with
    the keys and values of the tokens before each that is decoded; "ops" is two operations for each
    parameter and token. With TensorRT or several GPUs these two aren't known.

    --json writes vLLM's names: output_throughput, mean_ttft_ms, p99_itl_ms and so on, for each run.

    With --serve, prompts are of common words, as many as the server counts as so many tokens, and
    others in each round; tokens are counted by the server. What fails is counted by kind.

    Exit status: 0 all requests were answered, 1 some failed or there is no server, 2 wrong use.
    """
    _check_modes(ctx, serving=url is not None)
    outputs = {"json": json_file, "csv": csv_file, "report": report}
    _check_places(outputs, plots)
    name, path = given.pop("dataset_name"), given["dataset_path"]
    if (name == "sharegpt" and path is None) or (name == "synthetic" and path is not None):
        raise RequestError(
            "--dataset-path belongs to --dataset-name sharegpt: give both or none",
            param="dataset_path",
        )
    if path is not None and given["input_lens"] is not None:
        raise RequestError(
            "--input-len can't be given with a data set, whose prompts have their own",
            param="input_lens",
        )
    _fill(given, _QUICK if quick else _USUAL, has_data=path is not None)
    console = Console(sys.stderr, quiet=quiet, with_status=sys.stderr.isatty())
    from llama_runtime.bench.outputs import write

    record = _local(given, console) if url is None else _served(url, given, console)
    write(record, json_file=json_file, csv_file=csv_file, report=report, plots=plots)
    if any(run["failed"] or run.get("failed_in_all_rounds") for run in record["runs"]):
        ctx.exit(FAILED)


def _check_modes(ctx: click.Context, *, serving: bool) -> None:
    """Refuse what has no effect."""
    for name in _LOCAL if serving else _SERVED:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            rule = "can't be given with --serve" if serving else "needs --serve"
            raise RequestError(f"{option} {rule}", param=name)


def _check_places(files: dict[str, Path | None], plots: Path | None) -> None:
    """See that everything can be written, before hours have been spent.

    Raises:
        RequestError: a folder is missing, or two outputs are one file.
    """
    paths = [path for path in files.values() if path is not None and str(path) != "-"]
    for name, path in files.items():
        if path is None or (name == "json" and str(path) == "-"):
            continue
        if not path.parent.is_dir():
            raise RequestError(f"--{name}: the folder {path.parent} does not exist", param=name)
        if not os.access(path.parent, os.W_OK):
            raise RequestError(f"--{name}: can't write into {path.parent}", param=name)
    if len({path.resolve() for path in paths}) < len(paths):
        raise RequestError("--json, --csv and --report must be different files", param="json")
    if plots is not None and not plots.is_dir() and not plots.parent.is_dir():
        raise RequestError(f"--plots: the folder {plots.parent} does not exist", param="plots")


def _fill(given: dict[str, Any], usual: dict[str, Any], *, has_data: bool) -> None:
    """What the user leaves to us; a data set has lengths of its own."""
    for name, value in usual.items():
        if given[name] is None and not (has_data and name in ("input_lens", "output_lens")):
            given[name] = value


def _local(given: dict[str, Any], console: Console) -> dict[str, Any]:
    from llama_runtime.bench.local import LocalOptions, run_local

    options = {name: value for name, value in given.items() if name not in _SERVED}
    options["batch_sizes"] = sorted(set(options["batch_sizes"]))
    options["strategies"] = list(dict.fromkeys(options["strategies"]))
    options["input_lens"] = options["input_lens"] or ()
    return run_local(LocalOptions(**options), console)


def _served(url: str, given: dict[str, Any], console: Console) -> dict[str, Any]:
    from llama_runtime.bench.api_client import read_key
    from llama_runtime.bench.served import ServeOptions, run_served

    options = {name: value for name, value in given.items() if name not in _LOCAL}
    path = options.pop("api_key_file")
    try:
        text = None if path is None else path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not ASCII text"
        raise RequestError(
            f"--api-key-file: {path} can't be read: {reason}",
            param="api_key_file",
        ) from error
    sizes = options.pop("max_concurrency")
    options["max_concurrency"] = [None] if sizes is None else sorted(set(sizes))
    options["input_lens"] = options["input_lens"] or ()
    key = read_key(os.environ.get(KEY), text)
    return run_served(ServeOptions(url=url, key=key, **options), console)
