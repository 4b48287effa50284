"""The process in which chat templates are rendered, with limits of time and memory.

There is one for each process that renders: it starts with the first template, in about 0.05 s, and
ends with this process, whatever ends it. A rendering that goes over a limit ends only it, and the
next one starts another.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from llama_runtime.errors import CaravanError
from llama_runtime.template_renderer import Answer, answer, read_frame, write_frame

logger = logging.getLogger(__name__)

WALL_SECONDS = 20.0  # where the system doesn't limit computing time, and against all else

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from llama_runtime.template_renderer import main
main()
"""


class TemplateProcess:
    """Asks one renderer in a process of its own, which is started when there is none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(
        self, source: str, variables: Mapping[str, object] | None, now: datetime | None = None
    ) -> Answer | None:
        """Compile a template, and render it if there are variables.

        Args:
            source: the Jinja source.
            variables: JSON values; None only compiles.
            now: the time to tell the template; None for that of the clock.

        Returns:
            See ``template_renderer.answer``; None if it went over a limit of time or memory, or
            crashed the renderer.

        Raises:
            CaravanError: the process can't be started.
        """
        request = _request(source, variables, now)
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

    def _exchange(self, request: bytes) -> Answer | None:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = _start()
        process = self._process
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the renderer has no pipes")
        watchdog = threading.Timer(WALL_SECONDS, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            write_frame(process.stdin, request)
            reply = read_frame(process.stdout)
        except BrokenPipeError:
            reply = b""
        finally:
            watchdog.cancel()
        if not reply:
            self._end()
            return None
        value: Answer = json.loads(reply)
        return value

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
                    logger.debug("the renderer ended before it had read its request")
        process.wait()


def ask(
    source: str, variables: Mapping[str, object] | None, now: datetime | None = None
) -> Answer | None:
    """See ``TemplateProcess.ask``.

    In a program that embeds Python, no interpreter may be there to start. Then templates are
    rendered in this process, within the limits of fuel alone.
    """
    if not _has_interpreter():
        logger.warning("no Python interpreter to start: templates are rendered without limits")
        return answer(_request(source, variables, now))
    return _shared.ask(source, variables, now)


def _request(source: str, variables: Mapping[str, object] | None, now: datetime | None) -> bytes:
    time = None if now is None else now.isoformat()
    return json.dumps({"source": source, "variables": variables, "now": time}).encode()


def _has_interpreter() -> bool:
    return Path(sys.executable or "").name.lower().startswith(("python", "pypy"))


def _start() -> subprocess.Popen[bytes]:
    path = json.dumps([entry for entry in sys.path if entry])
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that a terminal's Ctrl-C doesn't reach it
        )
    except OSError as error:
        raise CaravanError(
            f"the process that renders chat templates can't be started: {error}"
        ) from error


_shared = TemplateProcess()
atexit.register(_shared.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_shared.forget)
