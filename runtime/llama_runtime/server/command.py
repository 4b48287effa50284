"""``llama-run serve``: listen, load, answer, and end without cutting anybody off."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.errors import CaravanError, DependencyError, RequestError
from llama_runtime.progress import Console
from llama_runtime.server import INSTALL
from llama_runtime.server.app import app_of
from llama_runtime.server.json_log import log_to
from llama_runtime.server.keys import is_loopback
from llama_runtime.server.origins import loopback_names
from llama_runtime.server.places import MAX_CONNECTIONS, SPARE, Places
from llama_runtime.server.service import Service
from llama_runtime.server.settings import ServerSettings

try:
    import uvicorn

    from llama_runtime.server.protocol import Connection
except ModuleNotFoundError as error:
    raise DependencyError(f"the server needs starlette and uvicorn ({error}): {INSTALL}") from error

logger = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 65  # longer than the balancers before it, which else send into a closed door
LAST_SECONDS = 5.0  # for the last words to those who are cut off
CLOSE_SECONDS = 10.0  # for the step that runs
BACKLOG = 2048  # connections that wait to be accepted
OTHER_FILES = 128  # that are open beside connections


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a user asks of ``llama-run serve``; see its help.

    Attributes:
        bundle: the model.
        settings: how to answer.
        host: where to listen.
        port: where to listen; 0 for a free one.
        insecure: whether others than this machine may ask without a key.
        max_connections: of clients; None takes 4,096, or what the limit on open files allows.
        shutdown_timeout: seconds that those who are being answered have when it is to end.
        max_queued_requests: see ``AsyncLLM``, as for those below.
        max_queued_tokens: prompt tokens that may wait.
        max_batch: sequences that run at once.
        max_len: tokens of a sequence.
        threads: of the kernels.
        devices: of CUDA.
        prefix_tokens: of prompts that are kept.
    """

    bundle: Path
    settings: ServerSettings
    host: str
    port: int
    insecure: bool
    max_connections: int | None
    shutdown_timeout: float
    max_queued_requests: int
    max_queued_tokens: int
    max_batch: int | Literal["auto"] | None
    max_len: int | None
    threads: int | None
    devices: Seq[int] | None
    prefix_tokens: int | None


def run(options: ServeOptions, console: Console) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        CaravanError: it can't listen there, the model can't be loaded, or this process may not have
            so many connections.
    """
    settings, on_loopback = options.settings, is_loopback(options.host)
    if not settings.api_keys and not options.insecure and not on_loopback:
        raise RequestError(
            f"--host {options.host} can be reached from other machines: give --api-key-file, or "
            "--insecure to let anybody ask",
            param="host",
        )
    if on_loopback:
        settings = replace(settings, host_names=loopback_names(options.host))
        options = replace(options, settings=settings)
    log_to(sys.stderr)
    max_connections = _max_connections(options.max_connections)
    with _listening(options.host, options.port) as listeners:
        asyncio.run(_serve(options, listeners, max_connections, console))


class _Server(uvicorn.Server):
    """One that leaves signals to us: uvicorn's own would stop listening while it drains."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_of(service: Service, max_connections: int = MAX_CONNECTIONS) -> uvicorn.Server:
    """A server of HTTP/1.1 for a service; its ``serve`` installs no signal handlers.

    Args:
        service: what it serves.
        max_connections: of clients.
    """
    config = uvicorn.Config(
        app_of(service),
        http=partial(Connection, places=Places(max_connections)),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=service.settings.max_header_bytes,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=2,
    )
    return _Server(config)


async def _serve(
    options: ServeOptions, listeners: list[socket.socket], max_connections: int, console: Console
) -> None:
    service = Service(options.settings)
    server = server_of(service, max_connections)
    serving = asyncio.create_task(server.serve(sockets=listeners))
    addresses = " and ".join(map(_url, listeners))
    page = f"{_url(listeners[0])}/"
    console.say(f"listening on {addresses}; {page} shows what it does; the model is being loaded")
    try:
        llm = await _load(options)
        try:
            service.begin(llm)
            console.say(f"ready as {' and '.join(service.names)} on {addresses}")
            await _until_told(service, options.shutdown_timeout, console)
        finally:
            service.stop()
            closing = asyncio.create_task(llm.close(CLOSE_SECONDS))
            await service.settled(LAST_SECONDS)
            await closing
    finally:
        server.should_exit = True
        await serving


async def _load(options: ServeOptions) -> AsyncLLM:
    return await AsyncLLM.load(
        options.bundle,
        max_batch=options.max_batch,
        max_len=options.max_len,
        threads=options.threads,
        devices=options.devices,
        prefix_tokens=options.prefix_tokens,
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
    )


async def _until_told(service: Service, shutdown_timeout: float, console: Console) -> None:
    """Answer until a signal comes, then only those who are being answered; a second one hurries."""
    told = [asyncio.Event(), asyncio.Event()]

    def take() -> None:
        told[told[0].is_set()].set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, take)
    await told[0].wait()
    service.refuse()
    patience = 0.0 if service.hangs else shutdown_timeout  # in which nothing would end
    console.say(
        f"shutting down: {service.num_active} requests have {patience:g} s to end; "
        "another signal ends them at once"
    )
    hurried = asyncio.create_task(told[1].wait())
    settled = asyncio.create_task(service.settled(patience))
    await asyncio.wait({hurried, settled}, return_when=asyncio.FIRST_COMPLETED)
    for task in (hurried, settled):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    if service.num_active:
        logger.warning("%d requests are cut off", service.num_active)


@contextmanager
def _listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """A socket for each address of a host, all with one port.

    Raises:
        CaravanError: one can't be had.
    """
    with ExitStack() as stack:
        sockets: list[socket.socket] = []
        refused: OSError | None = None
        for family, _, _, _, address in _addresses(host, port):
            one = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken = sockets[0].getsockname()[1] if sockets else port
            try:
                one.bind((address[0], taken, *address[2:]))
                one.listen(BACKLOG)  # so that nobody is turned away once it is said
                sockets.append(one)
            except OSError as error:
                refused = error
                if error.errno != errno.EADDRNOTAVAIL:  # as where a machine has no IPv6
                    break
        if refused is not None and (not sockets or refused.errno != errno.EADDRNOTAVAIL):
            reason = refused.strerror or str(refused)
            raise CaravanError(
                f"--host {host} --port {port} can't be listened on: {reason}"
            ) from refused
        yield sockets


def _addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"--host {host!r:.80} can't be found: {error}", param="host") from error


def _max_connections(wanted: int | None) -> int:
    """How many connections fit below the limit on open files, which is raised as far as it goes.

    Above that limit none could be accepted, those of probes neither.

    Raises:
        RequestError: not as many as are wanted.
    """
    files = _allowed_files()
    room = MAX_CONNECTIONS if files is None else files - SPARE - OTHER_FILES
    if wanted is None:
        return max(1, min(MAX_CONNECTIONS, room))
    if files is not None and wanted > room:
        raise RequestError(
            f"--max-connections {wanted} takes {wanted + files - room:,} open files, and this "
            f"process may have {files:,}: give fewer, or raise the limit with ulimit -n",
            param="max_connections",
        )
    return wanted


def _allowed_files() -> int | None:
    """As many open files as this process may have, what is usual is 1,024; None for any number."""
    found: int | None = None
    if sys.platform != "win32":  # which has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                soft = hard
        found = None if soft == resource.RLIM_INFINITY else soft
    return found


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
