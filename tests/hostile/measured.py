"""Run a command in a process of its own, with limits, and measure what it took.

The system counts the memory of a process from before it becomes another program, so a fork of a
large one begins large. That is why a small one stands between: this file, run as a program.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ADDRESS_BYTES = 6 * 2**30  # a bomb shall fail and not take the machine with it


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a command.

    Attributes:
        status: its exit status; negative if a signal ended it.
        seconds: from start to end.
        peak_bytes: the most memory that it, or one of its children, had resident.
        out: what it wrote on standard output.
        said: what it wrote on standard error.
    """

    status: int
    seconds: float
    peak_bytes: int
    out: bytes
    said: str


def measured(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, limit_s: float = 20.0
) -> Run:
    """Run a command to its end, which a kill brings about after ``limit_s``."""
    reading, writing = os.pipe()
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as said,
        open(reading, encoding="utf-8") as report,
    ):
        launcher = [sys.executable, "-I", "-S", __file__, str(writing), str(limit_s)]
        process = subprocess.Popen(
            [*launcher, *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=said,
            env=env,
            pass_fds=[writing],
        )
        os.close(writing)
        status, seconds, peak_bytes = json.loads(report.read())
        process.wait()
        out.seek(0)
        said.seek(0)
        return Run(status, seconds, peak_bytes, out.read(), said.read().decode(errors="replace"))


def _launch(report: int, limit_s: float, command: Sequence[str]) -> None:
    """Run the command and write what it took."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    start = time.monotonic()
    process = subprocess.Popen(command, close_fds=True)
    watchdog = threading.Timer(limit_s, process.kill)
    watchdog.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    watchdog.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    figures = [process.returncode, seconds, usage.ru_maxrss * 1024]
    os.write(report, json.dumps(figures).encode())


if __name__ == "__main__":
    _launch(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
