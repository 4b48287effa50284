"""The way to a Ray cluster: which Ray, where it is, and what room it has."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from llama_runtime.errors import (
    BackendError,
    CapacityError,
    DependencyError,
    RequestError,
    one_line,
)
from llama_runtime.machine import default_threads

LEAST_RAY = (2, 54)  # closes a hole in its dashboard, CVE-2026-27482
INSTALL = "pip install 'llama-caravan[scale]'"
LOCAL = "local"
CONNECT_SECONDS = 10
_SETTINGS = b"\x04"  # the type of the first frame of HTTP/2, after three bytes of length
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"
# Reads until the process that started it is gone. Most of Ray's processes end with that one, and
# those that don't have files open in the folder.
_HEIR = """
read -r _; sleep 2
for process in /proc/[0-9]*; do
    if ls -l "$process/fd" 2>/dev/null | grep -qF " $0/"; then kill -9 "${process#/proc/}"; fi
done
rm -rf "$0"
"""
_STORE_BYTES = 2**28  # of shared memory for a Ray of our own: what passes through it is text


def import_ray() -> Any:
    """Ray, which sends no usage statistics and whose log stays in its files.

    Raises:
        DependencyError: it isn't there, or too old.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no Ray is started but by ``connected``
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray looks again and again; this is how long in all.
    os.environ.setdefault("RAY_py_gcs_connect_timeout_s", str(CONNECT_SECONDS))
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DependencyError(f"--ray needs Ray and pyarrow ({error}): {INSTALL}") from error
    check_version(ray.__version__)
    return ray


def check_version(version: str) -> None:
    """Refuse a Ray that is too old.

    Raises:
        DependencyError: it is.
    """
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found < LEAST_RAY:
        least = ".".join(map(str, LEAST_RAY))
        raise DependencyError(
            f"Ray {version} has a known hole in its dashboard (CVE-2026-27482), and {least} is the "
            f"first without: install it on all nodes with {INSTALL}"
        )


def check_address(address: str) -> None:
    """Refuse an address at which nothing listens.

    Args:
        address: ``local``, ``auto``, or ``HOST:PORT``.

    Raises:
        RequestError: it is none of these.
        BackendError: there is no answer.
    """
    if address in (LOCAL, "auto"):
        return
    host, colon, port = address.rpartition(":")
    if not colon or not host or "/" in host or not port.isdecimal() or int(port) > 65535:
        raise RequestError(
            f"{address!r:.80} is no address of a Ray cluster: give HOST:PORT of its head node (the "
            "port is 6379 unless it was chosen), auto or local",
            param="ray",
        )
    try:
        _greet(host.strip("[]"), int(port))
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise BackendError(
            f"no Ray cluster answers at {address} ({reason}): start one there with ray start "
            "--head, or give --ray another address"
        ) from error


def _greet(host: str, port: int) -> None:
    """Connect, and wait for the first words of HTTP/2, which Ray speaks.

    Ray itself would wait minutes for an answer.
    """
    with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return  # it would say nothing to us
        connection.settimeout(CONNECT_SECONDS)
        connection.sendall(_HELLO)
        frame = connection.recv(9, socket.MSG_WAITALL)
    if frame[3:4] != _SETTINGS:
        raise OSError("what answers is no Ray")


@contextmanager
def connected(address: str, *, quiet: bool = True) -> Iterator[Any]:
    """Ray, connected to a cluster until the block ends.

    Args:
        address: see ``check_address``. With ``local`` a Ray is started for this process, without a
            dashboard. It answers who has the token only, which is in ``~/.ray``.
        quiet: whether what Ray says goes to its own log files only.

    Raises:
        DependencyError: Ray is missing, too old, or another one there.
        RequestError: the address is none.
        BackendError: no cluster answers there.
    """
    if address == LOCAL:  # Ray's processes listen beyond this machine: who calls must have a token
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if quiet:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    ray = import_ray()
    check_address(address)
    settings: dict[str, Any] = {"address": address, "log_to_driver": not quiet}
    if quiet:
        settings["logging_level"] = logging.CRITICAL
    with ExitStack() as stack:
        if address == LOCAL:
            settings |= {
                "num_cpus": default_threads(),
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_temp_dir": stack.enter_context(_scratch_folder()),
            }
        stack.callback(ray.shutdown)
        with _silence() if quiet else nullcontext():
            _start(ray, address, settings)
        if quiet:
            _silence_ray(ray)
        yield ray


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """A folder that is gone when the block ends, and soon after this process has been killed."""
    # A short name: the system allows 107 bytes for the path of a socket within.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    command = ["sh", "-c", _HEIR, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as heir:
        try:
            yield folder
        finally:
            heir.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _start(ray: Any, address: str, settings: dict[str, Any]) -> None:
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**settings)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError: whatever its layers say
        reason = one_line(error, 300)
        if "ersion mismatch" in reason:
            raise DependencyError(
                f"the cluster at {address} runs another Ray or Python than is installed here: "
                f"{reason}"
            ) from error
        raise BackendError(f"can't use the Ray cluster at {address}: {reason}") from error
    finally:
        if is_main and handler is not None:  # Ray has put its own there
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what is written to standard error; Ray's C++ says there how little it will say."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _silence_ray(ray: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Errors of the cluster go to standard output otherwise, in between results.
    ray._private.worker._worker_logs_enabled = False
    log = logging.getLogger("ray.data")
    for handler in list(log.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        ):
            log.removeHandler(handler)


def room(ray: Any, resource: str) -> list[int]:
    """How much of a resource each node has.

    Args:
        ray: connected.
        resource: ``CPU`` or ``GPU``.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [int(found.get(resource, 0)) for found in nodes]


def threads_each(cpus: Sequence[int], num_workers: int) -> int:
    """The most processors that each of so many workers can have; none is on two nodes.

    Args:
        cpus: of each node.
        num_workers: how many there are to be.

    Raises:
        CapacityError: there are fewer processors than workers.
    """
    for threads in range(max(cpus, default=0), 0, -1):
        if sum(count // threads for count in cpus) >= num_workers:
            return threads
    raise CapacityError(
        f"{num_workers} workers need a processor each, and the cluster has {sum(cpus)}: give "
        "fewer --workers, or add nodes",
        param="workers",
    )


def check_room(have: Sequence[int], each: int, num_workers: int, what: str) -> None:
    """Refuse workers that Ray would wait for in vain.

    Args:
        have: what each node has.
        each: what a worker takes.
        num_workers: how many there are to be.
        what: is counted, such as ``processors``.

    Raises:
        CapacityError: they don't fit.
    """
    fit = sum(count // each for count in have)
    if fit < num_workers:
        raise CapacityError(
            f"{num_workers} workers of {each} {what} don't fit: the nodes of the cluster have "
            f"{', '.join(map(str, have))} of them, enough for {fit} workers: give fewer --workers, "
            "or add nodes first",
            param="workers",
        )
