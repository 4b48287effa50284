"""``llama-run serve`` in a process of its own, seen from outside: its answers, log and /proc."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scripts.findings import Findings
from scripts.serving_client import Reply, ask, request_bytes

LLAMA_RUN = (sys.executable, "-m", "llama_runtime")
LOAD_SECONDS = 180.0
_GAUGES = ("sequences_running", "sequences_waiting", "requests_preparing", "cache_use_ratio")


class Held(NamedTuple):
    """What a process holds.

    Attributes:
        resident: bytes of memory that are in use.
        descriptors: open files and sockets.
        threads: all of them.
    """

    resident: int
    descriptors: int
    threads: int


@dataclass(slots=True)
class Server:
    """A server that runs.

    Attributes:
        process: of its own.
        port: of the loopback.
        model: its name.
        vocab_size: of the model.
        log: what it writes to standard error.
        key: that it wants, or None.
    """

    process: subprocess.Popen[bytes]
    port: int
    model: str
    vocab_size: int
    log: Path
    key: str | None = None

    async def get(self, path: str) -> Reply:
        """Ask for a path."""
        return await ask(self.port, request_bytes("GET", path, key=self.key))

    async def post(self, path: str, body: object) -> Reply:
        """Ask with a body."""
        return await ask(self.port, request_bytes("POST", path, body, key=self.key))

    async def metrics(self) -> dict[str, float]:
        """What ``/metrics`` says, by names without prefix; labels are summed over."""
        found: dict[str, float] = {}
        reply = await self.get("/metrics")
        for line in reply.body.decode().splitlines():
            if line.startswith("caravan_"):
                name, value = line.removeprefix("caravan_").rsplit(" ", 1)
                bare = name.partition("{")[0]
                found[bare] = found.get(bare, 0.0) + float(value)
        return found

    async def busy(self) -> dict[str, float]:
        """What of it is in use, by the gauges that are zero where nobody asks."""
        found = await self.metrics()
        return {name: found.get(name, -1.0) for name in _GAUGES if found.get(name) != 0}

    async def idle_after(self, patience: float) -> float | None:
        """Wait until nothing of it is in use; the seconds that took, or None if they are over."""
        began = time.monotonic()
        while await self.busy():
            if time.monotonic() - began > patience:
                return None
            await asyncio.sleep(0.01)
        return time.monotonic() - began

    async def at_rest(self, most: Held | None = None, patience: float = 5.0) -> Held:
        """What it holds where nothing is asked.

        Args:
            most: descriptors and threads to wait for, since a connection that a client closed is
                closed a moment later here; None takes what is there when it stays.
            patience: seconds to wait.
        """
        until, last = time.monotonic() + patience, self.held()
        while time.monotonic() < until:
            await asyncio.sleep(0.1)
            now = self.held()
            if most is None:
                if now[1:] == last[1:]:
                    return now
            elif now.descriptors <= most.descriptors and now.threads <= most.threads:
                return now
            last = now
        return last

    def held(self) -> Held:
        """What it holds now."""
        proc = Path("/proc") / str(self.process.pid)
        fields = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        resident = int(fields["VmRSS"].split()[0]) * 1024
        return Held(resident, len(os.listdir(proc / "fd")), int(fields["Threads"]))

    def told(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    async def status(self, patience: float) -> int | None:
        """The status that it ends with; None if it still runs after so many seconds."""
        until = time.monotonic() + patience
        while self.process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.01)
        return self.process.poll()

    def complaints(self) -> list[str]:
        """Lines of the log that nobody should find there."""
        found = []
        for line in self.log.read_text().splitlines():
            try:
                level = json.loads(line).get("level")
            except ValueError:
                level = "error" if "Traceback" in line else None
            if level in ("error", "critical"):
                found.append(line[:2000])
        return found


def check_bundle(bundle: Path) -> None:
    """End the program with a sentence if there is no bundle."""
    if not (bundle / "manifest.json").exists():
        raise SystemExit(f"{bundle} is no bundle: give --bundle, or make one by llama-export build")


@contextmanager
def running(
    start: Sequence[str], bundle: Path, folder: Path, *args: str, key: str | None = None
) -> Iterator[Server]:
    """A server that takes requests, until the block ends.

    Args:
        start: of a command line that is ``llama-run``.
        bundle: that it serves.
        folder: for its log and the file of its key.
        args: more of the command line.
        key: that it is to want.
    """
    check_bundle(bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    command = [*start, "serve", "--port", "0", "--bundle", str(bundle), *args]
    if key is not None:
        keys = folder / "keys"
        keys.write_text(f"{key}\n")
        keys.chmod(0o600)
        command += ["--api-key-file", str(keys)]
    log = folder / f"log-{time.monotonic_ns()}"
    with log.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            port = _port(process, log)
            vocab_size = manifest["geometry"]["vocab_size"]
            yield Server(process, port, manifest["name"], vocab_size, log, key)
        finally:
            process.kill()


@contextmanager
def watched(
    findings: Findings,
    start: Sequence[str],
    bundle: Path,
    folder: Path,
    *args: str,
    key: str | None = None,
) -> Iterator[Server]:
    """As ``running``; what its log complains of is among the findings, also if the block raises."""
    with running(start, bundle, folder, *args, key=key) as server:
        try:
            yield server
        finally:
            for line in server.complaints():
                findings.wrong("the log has no error", line)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    """Where it answers, as soon as it does."""
    until = time.monotonic() + LOAD_SECONDS
    while time.monotonic() < until and process.poll() is None:
        for line in log.read_text().splitlines(keepends=True):
            if line.startswith("ready as") and line.endswith("\n"):
                return int(line.rsplit(":", 1)[1])
        time.sleep(0.02)
    raise RuntimeError(f"the server isn't ready: {log.read_text()[-2000:]}")
