"""The options of ``llama-run serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from llama_runtime.cli_options import (
    bundle_option,
    devices_option,
    max_batch_option,
    max_len_option,
    prefix_tokens_option,
    request_timeout_option,
    threads_option,
)
from llama_runtime.cli_types import FILE, SECONDS, SECONDS_FROM_0
from llama_runtime.command_line import examples
from llama_runtime.progress import Console

MIB = 2**20
MAX_BODY_BYTES = 2**30
MAX_INCOMING_BYTES = 2**40
MAX_CONNECTIONS = 1_000_000
MAX_QUEUED_REQUESTS = 1_000_000  # as AsyncLLM has them, which takes long to import
MAX_QUEUED_TOKENS = 10**9


@click.command(
    epilog=examples(
        "llama-run serve",
        "llama-run serve --host 0.0.0.0 --api-key-file keys.txt --served-model-name llama",
    )
)
@bundle_option
@click.option(
    "--host",
    metavar="ADDRESS",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen. One that other machines reach needs --api-key-file or --insecure.",
)
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=FILE,
    help="Keys, one a line; one of them has to come with every request but /health, /ping, /ready "
    "and those for the page's own files. Others on this machine may not read the file.",
)
@click.option("--insecure", is_flag=True, help="Let anybody who reaches the host ask.")
@click.option(
    "--served-model-name",
    "names",
    metavar="NAME",
    multiple=True,
    help="What requests call the model; may be given several times.  [default: the bundle's name]",
)
@click.option(
    "--max-queued-requests",
    metavar="N",
    type=click.IntRange(1, MAX_QUEUED_REQUESTS),
    default=1024,
    show_default=True,
    help="So many requests may wait for a slot; one more is answered with 429.",
)
@click.option(
    "--max-queued-tokens",
    metavar="N",
    type=click.IntRange(1, MAX_QUEUED_TOKENS),
    default=1_000_000,
    show_default=True,
    help="With so many prompt tokens waiting, the same.",
)
@request_timeout_option
@click.option(
    "--max-queue-time",
    metavar="SECONDS",
    type=SECONDS,
    default=60.0,
    show_default=True,
    help="How long it may wait for a slot.",
)
@click.option(
    "--shutdown-timeout",
    metavar="SECONDS",
    type=SECONDS_FROM_0,
    default=30.0,
    show_default=True,
    help="How long those who are being answered have after SIGTERM or Ctrl-C.",
)
@click.option(
    "--max-body-bytes",
    metavar="N",
    type=click.IntRange(1, MAX_BODY_BYTES),
    default=4 * MIB,
    show_default=True,
    help="The most bytes of a request.",
)
@click.option(
    "--max-incoming-bytes",
    metavar="N",
    type=click.IntRange(1, MAX_INCOMING_BYTES),
    help="The most bytes of all requests that are being read; one more is answered with 429.  "
    "[default: 64 MiB, and --max-body-bytes at least]",
)
@click.option(
    "--max-connections",
    metavar="N",
    type=click.IntRange(1, MAX_CONNECTIONS),
    help="The most connections. One more takes the place of that which has waited longest for a "
    "request; if all have requests, it is answered with 503, but for /health and /ready.  "
    "[default: 4096, or as many as files may be open]",
)
@click.option(
    "--max-step-time",
    metavar="SECONDS",
    type=SECONDS,
    default=120.0,
    show_default=True,
    help="A step of the model that takes longer is taken to hang: /health and requests are "
    "answered with 503 until it ends.",
)
@click.option(
    "--metrics-compat",
    type=click.Choice(["vllm"]),
    help="Give the metrics by vLLM's names too, for boards and routers that know them.",
)
@max_batch_option
@max_len_option
@threads_option
@devices_option
@prefix_tokens_option
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but the log.")
def serve(
    bundle: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    insecure: bool,
    names: tuple[str, ...],
    max_queued_requests: int,
    max_queued_tokens: int,
    request_timeout: float,
    max_queue_time: float,
    shutdown_timeout: float,
    max_body_bytes: int,
    max_incoming_bytes: int | None,
    max_connections: int | None,
    max_step_time: float,
    metrics_compat: Literal["vllm"] | None,
    max_batch: int | Literal["auto"] | None,
    max_len: int | None,
    threads: int | None,
    devices: list[int] | None,
    prefix_tokens: int | None,
    quiet: bool,
) -> None:
    """Answer requests of OpenAI's API over HTTP.

    POST /v1/chat/completions and /v1/completions, as streams too, /tokenize and /detokenize; GET
    /v1/models, /metrics, /health, /ping, /ready and /version. Standard error gets a line of JSON a
    request, without what was asked or answered. GET / is a page that shows what the batch is doing,
    with a box to try a prompt.

    SIGTERM or Ctrl-C: new requests are refused with 503, those that are being answered have
    --shutdown-timeout to end, and what is left then is ended with an error. A second one ends them
    at once.

    Exit status: 0 it was told to end, 1 it can't listen there, 2 wrong use.
    """
    from llama_runtime.server.command import ServeOptions, run
    from llama_runtime.server.keys import read_keys
    from llama_runtime.server.settings import ServerSettings

    settings = ServerSettings(
        model_names=names,
        api_keys=() if api_key_file is None else read_keys(api_key_file),
        request_timeout=request_timeout,
        max_queue_time=max_queue_time,
        max_body_bytes=max_body_bytes,
        max_incoming_bytes=max_incoming_bytes,
        max_step_time=max_step_time,
        metrics_compat=metrics_compat,
    )
    options = ServeOptions(
        bundle=bundle,
        settings=settings,
        host=host,
        port=port,
        insecure=insecure,
        max_connections=max_connections,
        shutdown_timeout=shutdown_timeout,
        max_queued_requests=max_queued_requests,
        max_queued_tokens=max_queued_tokens,
        max_batch=max_batch,
        max_len=max_len,
        threads=threads,
        devices=devices,
        prefix_tokens=prefix_tokens,
    )
    run(options, Console(sys.stderr, quiet=quiet))
