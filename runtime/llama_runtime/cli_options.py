"""The options that several commands of ``llama-run`` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llama_runtime.cli_types import SECONDS, Devices, MaxBatch
from llama_runtime.constraints import MAX_CONSTRAINT_BYTES
from llama_runtime.errors import RequestError

bundle_option = click.option(
    "--bundle",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    default=Path("bundle"),
    show_default=True,
    envvar="LLAMA_RUN_BUNDLE",
    show_envvar=True,
    help="The bundle's directory.",
)


devices_option = click.option(
    "--devices",
    metavar="N,N",
    type=Devices(),
    envvar="LLAMA_RUN_DEVICES",
    show_envvar=True,
    help="CUDA devices to run on, an engine on each, for a bundle built for CUDA.  [default: 0]",
)
threads_option = click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(min=1),
    help="Threads of the kernels on the CPU.  [default: the processors this process may use]",
)
max_batch_option = click.option(
    "--max-batch",
    metavar="N|auto",
    type=MaxBatch(min=1),
    help="Prompts that run at once, on each device; auto finds the number that is fastest, up to "
    "128, and 256 on CUDA, as memory allows.  [default: auto in batch; else 32, and 128 on CUDA]",
)
max_len_option = click.option(
    "--max-len",
    metavar="N",
    type=click.IntRange(min=1),
    help="The context: the most tokens of a prompt and its completion.  [default: what fits of "
    "the model's limit, at most 4096]",
)
prefix_tokens_option = click.option(
    "--prefix-tokens",
    metavar="N",
    type=click.IntRange(min=0),
    help="Tokens of prompts that are kept, so that prompts which begin alike needn't compute them "
    "again; 0 turns it off.  [default: what fits, at most 4096; all of the cache on CUDA]",
)
request_timeout_option = click.option(
    "--request-timeout",
    metavar="SECONDS",
    type=SECONDS,
    default=600.0,
    show_default=True,
    help="What a request may take in all.",
)
control_tokens_option = click.option(
    "--allow-control-tokens",
    is_flag=True,
    help="Let the text of a control token in messages become that token. Otherwise it stays text, "
    "and no message can end its turn and begin another.",
)

_LENGTH = [
    click.option(
        "--max-tokens",
        metavar="N",
        type=int,
        help="The most tokens of a completion.  [default: 256; 1024 in chat]",
    ),
    click.option(
        "--min-tokens", metavar="N", type=int, help="Tokens before it may end.  [default: 0]"
    ),
    click.option(
        "--stop",
        metavar="TEXT",
        multiple=True,
        help="End where this text appears; may be given up to 16 times.",
    ),
    click.option("--include-stop", is_flag=True, default=None, help="Show the stop text as well."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        metavar="ID",
        type=int,
        multiple=True,
        help="End at this token too; may be given several times.",
    ),
    click.option(
        "--ignore-eos", is_flag=True, default=None, help="Go on past the model's end tokens."
    ),
]
_SAMPLING = [
    click.option(
        "--temperature",
        metavar="X",
        type=float,
        help="0 takes the likeliest token; higher is more varied.  [default: the bundle's]",
    ),
    click.option(
        "--top-p",
        metavar="X",
        type=float,
        help="Sample among the likeliest tokens that together hold this probability; 1 turns "
        "it off.  [default: the bundle's]",
    ),
    click.option(
        "--top-k",
        metavar="N",
        type=int,
        help="Sample among the k likeliest tokens; 0 turns it off.  [default: the bundle's]",
    ),
    click.option(
        "--min-p",
        metavar="X",
        type=float,
        help="Sample among the tokens at least this many times as likely as the likeliest.  "
        "[default: the bundle's]",
    ),
    click.option(
        "--repetition-penalty",
        metavar="X",
        type=float,
        help="Above 1, make tokens of the prompt and the completion less likely.  "
        "[default: the bundle's]",
    ),
    click.option(
        "--presence-penalty",
        metavar="X",
        type=float,
        help="Taken off the logits of tokens that the completion holds, -2 to 2.  [default: 0]",
    ),
    click.option(
        "--frequency-penalty",
        metavar="X",
        type=float,
        help="The same, times how often it holds them.  [default: 0]",
    ),
    click.option(
        "--logit-bias",
        metavar="ID=X",
        multiple=True,
        help="Add X, -100 to 100, to a token's logit; may be given several times.",
    ),
    click.option(
        "--seed",
        metavar="N",
        type=int,
        help="Draw the same random numbers again.  [default: a fresh one]",
    ),
    click.option("-n", "n", metavar="N", type=int, help="Completions a prompt.  [default: 1]"),
    click.option(
        "--speculation",
        type=click.Choice(["off", "on", "auto"]),
        help="Guess tokens from what the text holds already and verify several in a step, which is "
        "faster where it repeats itself, as in edits; auto does so on the CPU without a seed.  "
        "[default: off]",
    ),
]
_CONSTRAINTS = [
    click.option(
        "--json-schema",
        metavar="FILE|JSON",
        help="Hold the completion to JSON that this schema allows: a file, or the schema itself if "
        "it begins with {.",
    ),
    click.option("--regex", metavar="TEXT", help="Hold it to a regular expression."),
    click.option(
        "--choice",
        metavar="TEXT",
        multiple=True,
        help="Hold it to one of several texts; given once for each.",
    ),
    click.option(
        "--grammar",
        metavar="FILE",
        help="Hold it to a grammar in the Lark dialect of llguidance.",
    ),
]
_SCORES = [
    click.option(
        "--logprobs",
        is_flag=True,
        default=None,
        help="Report each token's log-probability under the model itself.",
    ),
    click.option(
        "--top-logprobs",
        metavar="N",
        type=int,
        help="And those of the N likeliest tokens at its place, up to 20.",
    ),
    click.option(
        "--prompt-logprobs", is_flag=True, default=None, help="Report those of the prompt."
    ),
]


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how prompts are continued."""
    options = [
        bundle_option,
        click.option(
            "--chat/--no-chat",
            default=None,
            help="Give each prompt as a user's message, laid out by the bundle's chat template; "
            "or as raw text.  [default: as chat if there is a template]",
        ),
        *_LENGTH,
        *_SAMPLING,
        *_CONSTRAINTS,
        *_SCORES,
        threads_option,
        devices_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user gave, by the names of ``SamplingParams``.

    So the bundle's own stay where there are none.

    Raises:
        RequestError: a bias is not a token id and a number, or a file can't be read as text.
    """
    found = {name: value for name, value in options.items() if value not in (None, ())}
    if not found.get("json_schema", "{").lstrip().startswith("{"):
        found["json_schema"] = _text_of("json_schema", found["json_schema"])
    if "grammar" in found:
        found["grammar"] = _text_of("grammar", found["grammar"])
    if "logit_bias" in found:
        found["logit_bias"] = dict(map(_bias, found["logit_bias"]))
    return found


def _text_of(param: str, path: str) -> str:
    """The text of a file, or of as much as is more than may be used."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONSTRAINT_BYTES + 1)
        if len(data) <= MAX_CONSTRAINT_BYTES:
            return data.decode("utf-8")
        problem = f"it has more than {MAX_CONSTRAINT_BYTES:,} bytes"
    except UnicodeDecodeError as error:
        problem = f"it is not UTF-8 text at byte {error.start + 1}"
    except OSError as error:
        problem = error.strerror or str(error)
    option = "--" + param.replace("_", "-")
    raise RequestError(f"{option}: {path} can't be read: {problem}", param=param)


def _bias(text: str) -> tuple[int, float]:
    token_id, _, value = text.partition("=")
    try:
        return int(token_id), float(value)
    except ValueError:
        raise RequestError(
            f"--logit-bias must be ID=X, such as 42=-100, not {text!r:.80}", param="logit_bias"
        ) from None
