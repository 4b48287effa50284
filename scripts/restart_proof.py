"""Proof that a server which is killed is there again soon; scripts/prove_restart runs it.

A server is started over and over on one port. Each time clients ask it for streams and whole
answers, more than have slots, and it is killed in the middle. Then each of them must see its
connection closed, with no answer that looks whole; and the next start must be able to listen there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from scripts.serving_process import check_bundle

PATIENCE = 60.0  # seconds for what takes none where all is well
HANG_SECONDS = 2.0  # after which a client of a process that is gone hangs
POLL_SECONDS = 0.01
UNDER_WAY_SECONDS = 0.5  # until streams have begun


def main() -> None:
    """Parse arguments, run, print what is wrong, figures, and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/prove_restart")
    parser.add_argument("--bundle", type=Path, required=True, help="what to serve")
    parser.add_argument("--kills", type=int, default=5, help="SIGKILLs (5)")
    parser.add_argument("--terms", type=int, default=5, help="SIGTERMs while it loads (5)")
    parser.add_argument("--clients", type=int, default=48, help="that are being answered (48)")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds to /ready (30)")
    args = parser.parse_args()
    check_bundle(args.bundle)
    with tempfile.TemporaryDirectory() as name:
        # Each kill comes with a start of its own; what the first one has verified is remembered.
        os.environ["XDG_CACHE_HOME"] = name
        start = [sys.executable, "-m", "llama_runtime"]
        proof = RestartProof(start, args.bundle, Path(name) / "said", args.limit)
        for _ in range(args.kills):
            proof.kill(args.clients)
        proof.kill(0)
        proof.end_while_loading(args.terms, random.Random(0))
        left = {path.name for path in Path(name).rglob("*") if path.is_file()}
        if left - {"verified.json", "said"}:
            proof.bad.append(f"the cache has {left}")
    for line in proof.bad:
        print(line)
    print(json.dumps({"passed": not proof.bad, "kills": args.kills, **proof.figures()}))
    sys.exit(bool(proof.bad))


@dataclass(frozen=True, slots=True)
class Start:
    """What one start took, in seconds from that of the process.

    Attributes:
        listening: until it listened, which is Python and its imports.
        ready: until /ready was true, which adds the model.
    """

    listening: float
    ready: float


@dataclass
class RestartProof:
    """Starts a server, and ends it.

    Args:
        start: of a command line that is ``llama-run``.
        bundle: that it serves.
        said: a file for what it says.
        limit: seconds until it has to be ready.

    Attributes:
        bad: what went wrong, each a sentence.
        starts: what they took.
        num_cut: clients whose connections were closed on them.
        num_ended: starts that were ended while the model was being loaded.
    """

    start: Sequence[str]
    bundle: Path
    said: Path
    limit: float
    bad: list[str] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    num_cut: int = 0
    num_ended: int = 0
    _port: int = 0

    def kill(self, clients: int) -> None:
        """Start the server where it was before, and kill it while it answers so many clients."""
        began = time.monotonic()
        process = self._started()
        try:
            line = self._until(process, "listening on ")
            self._port = self._port or int(line.split("; ")[0].rpartition(":")[2])
            listening = time.monotonic() - began
            while not _is_ready(self._port):
                if time.monotonic() - began > self.limit:
                    self.bad.append(f"it isn't ready after {self.limit:g} s")
                    return
                time.sleep(POLL_SECONDS)
            self.starts.append(Start(listening, time.monotonic() - began))
            print(f"listens after {listening:.2f} s, is ready after {self.starts[-1].ready:.2f} s")
            if clients:
                self._kill_under_load(process, clients)
        finally:
            process.kill()
            process.wait(PATIENCE)

    def end_while_loading(self, count: int, rng: random.Random) -> None:
        """Have a supervisor end it before it is ready: nothing of it may be left."""
        longest = max(start.ready for start in self.starts)
        while self.num_ended < count:
            process = self._started()
            time.sleep(rng.uniform(0.3, 1.0) * longest)
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
            said = self.said.read_text()
            if "\nready as " in said:
                continue
            self.num_ended += 1
            # The first while Python has not come to its first line, the other from there on.
            if process.returncode not in (-signal.SIGTERM, 128 + signal.SIGTERM):
                self.bad.append(f"SIGTERM while it loads: status {process.returncode}, {said!r}")
            if _exists_in_group(process.pid):
                self.bad.append("SIGTERM while it loads left a process")
            with socket.socket() as one:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(("127.0.0.1", self._port))

    def figures(self) -> dict[str, object]:
        """What was seen, for the line of JSON."""
        ready = [start.ready for start in self.starts]
        listening = [start.listening for start in self.starts]
        return {
            "clients_cut": self.num_cut,
            "ended_while_loading": self.num_ended,
            "seconds_to_ready": {"median": _median(ready), "worst": round(max(ready), 2)},
            "seconds_to_listening": {"median": _median(listening)},
        }

    def _started(self) -> subprocess.Popen[bytes]:
        command = [*self.start, "serve", "--bundle", str(self.bundle), "--port", str(self._port)]
        command += ["--threads", "1", "--max-batch", "32", "--max-len", "512"]
        with self.said.open("wb") as said:  # and not a pipe, which is full at times
            return subprocess.Popen(command, stderr=said, start_new_session=True)

    def _until(self, process: subprocess.Popen[bytes], words: str) -> str:
        """The first line that begins so."""
        while True:
            said = self.said.read_text()
            for line in said.splitlines(keepends=True):
                if line.startswith(words) and line.endswith("\n"):
                    return line.strip()
            if process.poll() is not None:
                raise RuntimeError(f"the server has ended: {said}")
            time.sleep(POLL_SECONDS)

    def _kill_under_load(self, process: subprocess.Popen[bytes], clients: int) -> None:
        name = json.loads((self.bundle / "manifest.json").read_text())["name"]
        with ThreadPoolExecutor(clients) as pool:
            asked = [
                pool.submit(_read_all, self._port, _request(name, stream=number % 3 > 0))
                for number in range(clients)
            ]
            while not all(one.running() for one in asked):
                time.sleep(POLL_SECONDS)
            while self.said.read_text().count("\n") < 2:  # it has said that it is ready
                time.sleep(POLL_SECONDS)
            time.sleep(UNDER_WAY_SECONDS)
            process.kill()
            killed = time.monotonic()
            answers = [one.result() for one in asked]
        seconds = time.monotonic() - killed
        if seconds > HANG_SECONDS:
            self.bad.append(f"a client knew after {seconds:.1f} s that the server is gone")
        for answer in answers:
            if answer is None:
                self.bad.append("a client hangs")
            elif _looks_whole(answer):
                self.bad.append(f"an answer looks whole: {answer[-100:]!r}")
            else:
                self.num_cut += 1


def _request(model: str, *, stream: bool) -> bytes:
    body: dict[str, object] = {"model": model, "prompt": "Gravity is", "max_tokens": 480}
    data = json.dumps(body | {"stream": stream, "ignore_eos": True}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _read_all(port: int, request: bytes) -> bytes | None:
    """What comes until the connection is closed; None if it isn't."""
    data = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(request)
        try:
            while piece := connection.recv(65536):
                data += piece
        except ConnectionResetError:
            pass
        except TimeoutError:
            return None
    return data


def _looks_whole(answer: bytes) -> bool:
    """Whether a client takes it for an answer that has ended."""
    head, _, body = answer.partition(b"\r\n\r\n")
    _, announced, rest = head.lower().partition(b"content-length: ")
    return len(body) == int(rest.split()[0]) if announced else b"[DONE]" in body


def _is_ready(port: int) -> bool:
    request = b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    return (_read_all(port, request) or b"").startswith(b"HTTP/1.1 200")


def _exists_in_group(group: int) -> bool:
    """Whether a process is left of a session, a moment after its first has ended."""
    time.sleep(0.2)
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 2)


if __name__ == "__main__":
    main()
