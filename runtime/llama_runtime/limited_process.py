"""Work on what strangers wrote, in a process of its own that has limits of time and memory.

A program is a module whose ``main`` calls ``serve``. Its process starts with the first request, in
about 0.05 s, and ends with this one, whatever ends it. A request that goes over a limit ends only
that process, and the next one starts another.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO

from llama_runtime.errors import CaravanError

logger = logging.getLogger(__name__)

WALL_SECONDS = 20.0  # where the system doesn't limit computing time, and against all else

_PROGRAM = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
importlib.import_module(sys.argv[2]).main()
"""


class LimitedProcess:
    """Asks one program in a process of its own, which is started when there is none.

    Args:
        module: the program.
        purpose: what it does, for errors: "renders chat templates".
    """

    def __init__(self, module: str, purpose: str) -> None:
        self._module, self._purpose = module, purpose
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        _all.add(self)

    def ask(self, request: bytes) -> bytes | None:
        """What the program answers; None if it went over a limit, or crashed.

        Raises:
            CaravanError: the process can't be started.
        """
        with self._lock:
            try:
                return self._exchange(request)
            except BaseException:  # an exchange that was cut short can't be taken up again
                self._end()
                raise

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """After a fork: what was started belongs to the parent."""
        self._lock = threading.Lock()
        if self._process is not None:
            self._process.returncode = 0  # else its disposal warns of a process that still runs
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def _exchange(self, request: bytes) -> bytes | None:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = self._started()
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the process has no pipes")
        watchdog = threading.Timer(WALL_SECONDS, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            _write_frame(process.stdin, request)
            reply = _read_frame(process.stdout)
        except BrokenPipeError:
            reply = b""
        finally:
            watchdog.cancel()
        if not reply:
            self._end()
            return None
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        path = json.dumps([entry for entry in sys.path if entry])
        try:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, path, self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,  # a buffer has a lock, which a fork may find held for ever
                start_new_session=True,  # so that a terminal's Ctrl-C doesn't reach it
            )
        except OSError as error:
            raise CaravanError(
                f"the process that {self._purpose} can't be started: {error}"
            ) from error

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    logger.debug("the process ended before it had read its request")
        process.wait()


@cache
def can_start() -> bool:
    """Whether there is an interpreter to start; a program that embeds Python may have none."""
    found = Path(sys.executable or "").name.lower().startswith(("python", "pypy"))
    if not found:
        logger.warning("no Python interpreter to start: templates and schemas run without limits")
    return found


def serve(answer: Callable[[bytes], bytes], *, cpu_seconds: float, memory_bytes: int) -> None:
    """Answer one request after the other until standard input ends.

    Args:
        answer: what to answer, which isn't empty.
        cpu_seconds: that one may compute for; the system ends the process after that.
        memory_bytes: of addresses, where the system can limit them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the program that asks
    _limit_memory(memory_bytes)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while request := _read_frame(requests):
        _limit_time(cpu_seconds)
        try:
            reply = answer(request)
        except MemoryError:
            return  # what is left may not be enough for another
        _limit_time(0)
        _write_frame(answers, reply)


def _read_frame(file: IO[bytes]) -> bytes:
    """One message; empty at the end."""
    size = int.from_bytes(_read(file, 8), "little")
    return _read(file, size)


def _read(file: IO[bytes], size: int) -> bytes:
    """So many bytes, or what is left of them; a pipe gives them in parts."""
    parts = []
    while size > 0 and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _write_frame(file: IO[bytes], data: bytes) -> None:
    """Write one message and hand it over."""
    left = memoryview(len(data).to_bytes(8, "little") + data)
    while left:
        left = left[file.write(left) :]
    file.flush()


def _limit_memory(num_bytes: int) -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: float) -> None:
    """Let the system end this process when it has computed for so long; 0 takes that back."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _close_all() -> None:
    for process in list(_all):
        process.close()


def _forget_all() -> None:
    for process in list(_all):
        process.forget()


_all: weakref.WeakSet[LimitedProcess] = weakref.WeakSet()
atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
