"""The ``llama-run`` command.

Numpy, tokenizers and onnxruntime are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

import click

from llama_runtime import __version__
from llama_runtime.batch_cli import batch
from llama_runtime.bench_cli import bench
from llama_runtime.cli_options import (
    bundle_option,
    control_tokens_option,
    devices_option,
    generation_options,
    given,
    max_batch_option,
    max_len_option,
    prefix_tokens_option,
    threads_option,
)
from llama_runtime.command_line import FAILED, Commands, examples, print_out
from llama_runtime.errors import CapacityError, RequestError
from llama_runtime.progress import Console
from llama_runtime.serve_cli import serve


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("llama-run batch prompts.txt"),
)
@click.version_option(__version__, message="Caravan %(version)s (llama-run)")
def cli() -> None:
    """Run a Llama bundle: many prompts at once, without PyTorch.

    A bundle is the directory that llama-export build writes.
    """


cli.add_command(batch)
cli.add_command(serve)
cli.add_command(bench)


@cli.command(
    epilog=examples(
        'llama-run generate "Why is the sky blue?"',
        'llama-run generate --no-chat "Once upon a time" --temperature 0.8',
    )
)
@click.argument("prompt")
@generation_options
@control_tokens_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, as batch does.")
def generate(
    prompt: str,
    bundle: Path,
    chat: bool | None,
    threads: int | None,
    devices: list[int] | None,
    allow_control_tokens: bool,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Complete PROMPT and show the text as it comes.

    "-" reads the prompt from standard input. With -n above 1 the completions follow each other, a
    line "--- 0 ---", "--- 1 ---", ... before each; log-probabilities need --json.
    """
    from llama_runtime.batch.forms.prompt_format import result_line
    from llama_runtime.batch.forms.prompt_rows import Row
    from llama_runtime.batch.forms.recipe import Recipe
    from llama_runtime.bundle import open_bundle
    from llama_runtime.generation_config import default_params
    from llama_runtime.llm import LLM
    from llama_runtime.prompt_encoder import PromptEncoder

    if prompt == "-":
        prompt = _read_prompt()
    encoder = PromptEncoder(open_bundle(bundle))
    defaults = default_params(encoder.bundle.generation_config)
    recipe = Recipe.of_job(
        encoder, defaults, given(sampling), chat, allow_control_tokens=allow_control_tokens
    )
    row = Row(0, prompt)
    request = recipe.request(row)
    params = request.params
    if (params.logprobs or params.prompt_logprobs) and not as_json:
        raise RequestError("log-probabilities need --json", param="logprobs")
    max_len = len(request.prompt) + params.max_tokens
    with LLM(encoder, max_batch=params.n, max_len=max_len, threads=threads, devices=devices) as llm:
        started = time.monotonic()
        if as_json:
            print_out(result_line(row, llm.generate(request.prompt, params), None).decode())
        elif params.n == 1:
            for event in llm.stream(request.prompt, params):
                print_out(event.text)
            print_out("\n")
        else:
            for completion in llm.generate(request.prompt, params):
                print_out(f"--- {completion.sample} ---\n{completion.text}\n")
        seconds, stats = time.monotonic() - started, llm.stats()
    if sys.stderr.isatty():
        click.echo(
            f"{stats.prompt_tokens} prompt and {stats.completion_tokens} completion tokens in "
            f"{seconds:.1f} s, {stats.completion_tokens / max(seconds, 1e-9):.1f} tokens/s",
            err=True,
        )


@cli.command(
    epilog=examples(
        "llama-run chat",
        'llama-run chat --system "Answer in one sentence." --temperature 0.7',
        "llama-run chat --load talk.json",
        'echo "Why is the sky blue?" | llama-run chat',
    )
)
@click.option("--system", metavar="TEXT", help="What the model is told before all messages.")
@click.option(
    "--load",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Go on with a conversation that /save wrote; options given here go before its own.",
)
@generation_options
@click.option(
    "--max-len",
    metavar="N",
    type=click.IntRange(min=1),
    help="The context: the most tokens of the conversation and its next answer.  [default: what "
    "fits of the model's limit, at most 4096]",
)
@prefix_tokens_option
@click.option("-q", "--quiet", is_flag=True, help="Say nothing that nobody asked for.")
def chat(
    system: str | None,
    load: Path | None,
    bundle: Path,
    chat: bool | None,
    threads: int | None,
    devices: list[int] | None,
    max_len: int | None,
    prefix_tokens: int | None,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Talk with the model.

    Enter sends a message and Alt-Enter begins a new line; what is pasted is one message. Ctrl-C
    stops an answer and what came of it stays; Ctrl-D ends the chat. /help shows the commands, among
    them /set for the options below, /retry, /undo, /save and /load. An answer may have 1024 tokens,
    unless another --max-tokens is given or loaded, and no more than the context has room for.

    From a pipe each line is a message, unless it ends in a backslash or begins a block between
    lines of three quotes. Answers go to standard output and all else to standard error.

    Exit status: 0 the chat was ended, 2 wrong use, 130 it was ended by Ctrl-C.
    """
    from llama_runtime.chat.command import Settings, run

    if chat is False:
        raise RequestError(
            "a chat needs the chat template: leave --no-chat out, or give raw text to llama-run "
            "generate",
            param="chat",
        )
    settings = Settings(
        bundle=bundle,
        options=given(sampling),
        system=system,
        load=load,
        max_len=max_len,
        threads=threads,
        devices=devices,
        prefix_tokens=prefix_tokens,
        quiet=quiet,
    )
    click.get_current_context().exit(run(settings))


@cli.command(epilog=examples("llama-run inspect --bundle ./bundle"))
@bundle_option
@click.option("--json", "as_json", is_flag=True, help="Print the manifest itself.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Check a bundle and show what it holds."""
    from llama_runtime.bundle import open_bundle
    from llama_runtime.bundle_text import describe

    manifest = open_bundle(bundle).manifest
    print_out(manifest.to_json() if as_json else describe(manifest))


@cli.command(
    name="eval",
    epilog=examples(
        "llama-run eval --bundle ./bundle",
        "llama-run eval --limit 4000 --json",
    ),
)
@bundle_option
@threads_option
@click.option(
    "--limit",
    metavar="TOKENS",
    type=click.IntRange(min=1),
    help="Predict about so many tokens, taken evenly from all kinds of text, at least one window "
    "of each.  [default: all, some 20,000]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(bundle: Path, threads: int | None, limit: int | None, as_json: bool) -> None:
    """Measure how good a bundle is, without the model that it was built from.

    The bundle predicts each token of real texts of several kinds, and its predictions are compared
    with those of the fp32 source, which the bundle has held since it was built. For each kind and
    for all: the mean Kullback-Leibler divergence in nats and its 99.9th percentile, how often the
    likeliest token is the same, the perplexities, and their ratio with its standard error.

    Bundles for the CPU only.

    Exit status: 0 the figures are within the gate of the precision, 1 they aren't, 2 wrong use.
    """
    from llama_runtime.bundle import open_bundle
    from llama_runtime.evaluation import command

    opened = open_bundle(bundle)
    report = command.run(opened, Console(sys.stderr), threads=threads, limit=limit)
    name = opened.manifest.name
    print_out(command.as_json(report) if as_json else command.as_text(name, report))
    if not report.passed:
        click.get_current_context().exit(FAILED)


@cli.command(
    epilog=examples(
        "llama-run plan",
        "llama-run plan --max-batch 64 --max-len 2048",
        "llama-run plan --json",
    )
)
@bundle_option
@devices_option
@max_batch_option
@max_len_option
@prefix_tokens_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON, sizes in bytes.")
def plan(
    bundle: Path,
    devices: list[int] | None,
    max_batch: int | Literal["auto"] | None,
    max_len: int | None,
    prefix_tokens: int | None,
    as_json: bool,
) -> None:
    """Show whether a setting fits into memory, without loading the model.

    The weights, the cache of --max-batch sequences of --max-len tokens, the prompts that are kept
    and the workspace, against what the machine or the container has left for this process; and the
    largest value of either of the first two options that fits with the other.

    Exit status: 0 it fits, 1 it doesn't, 2 wrong use.
    """
    from llama_runtime.llm import LLM
    from llama_runtime.memory_plan import describe

    found = LLM.plan(
        bundle,
        max_batch=max_batch,
        max_len=max_len,
        devices=devices,
        prefix_tokens=prefix_tokens,
    )
    if as_json:
        print_out(json.dumps(found.to_dict(), indent=2) + "\n")
    else:
        print_out(describe(found))
    try:
        found.check()
    except CapacityError as error:
        click.echo(f"Error: {error}", err=True)
        click.get_current_context().exit(FAILED)


@cli.command(
    epilog=examples(
        "llama-run collect-env",
        "llama-run collect-env --bundle ./bundle --json",
    )
)
@click.option(
    "--bundle",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Say what this bundle holds too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, sizes in bytes.")
def collect_env(bundle: Path | None, as_json: bool) -> None:
    """Show what a bug report needs.

    Versions of Caravan, Python and the libraries, and which of them can't be imported; the system,
    its processors and what they can do, memory, and what of both this process may use; GPUs; and
    the variables of the environment that change any of it. Nothing is sent anywhere. Folders and
    keys are left out.

    Exit status: 0 it was shown, whatever it shows; 2 wrong use.
    """
    from llama_runtime.collect_env import command, page

    facts = command.collect(bundle)
    print_out(command.as_json(facts) if as_json else page.as_text(facts))


def _read_prompt() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"standard input is not UTF-8 text at byte {error.start + 1}"
        raise RequestError(message, param="prompt") from error
    return text.removesuffix("\n").removesuffix("\r")
