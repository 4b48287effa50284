"""The example of Ray Serve: answers, refuses what is too much, frees slots, and ends in peace."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own imports


class Served:
    """The other side of ``tests.ray_serve_driver``."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self._port = port

    def is_ready(self) -> bool:
        """Whether it has started; waits until that is known."""
        return self._said() == "ready"

    def ask(self) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send a question; the answer as it begins."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("POST", "/", body=b"Who?")
        return connection, connection.getresponse()

    def answer(self) -> tuple[int, str | None, bytes]:
        """Ask; status, Retry-After and text."""
        connection, response = self.ask()
        with contextlib.closing(connection):
            return response.status, response.getheader("Retry-After"), response.read()

    def running(self) -> int:
        """Sequences that hold a slot."""
        self.tell("running")
        return int(self._said())

    def tell(self, command: str) -> None:
        """See ``tests.ray_serve_driver``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def _said(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip() in ("ready", "deleted") or line.strip().isdigit():
                return line.strip()
        return "nothing"


STARTS = 2  # Ray's own start is not what is tested here, and fails at times where much else runs


@pytest.fixture(scope="module")
def served(tiny_bundle: Path) -> Iterator[Served]:
    said = ""
    for _ in range(STARTS):
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: sockets lie in it
        with starting(tiny_bundle, folder) as found:
            if found.is_ready():
                yield found
                return
            said = (folder / "said").read_text()
    pytest.fail(f"Ray Serve has not started: {said[-2000:]}")


@contextlib.contextmanager
def starting(bundle: Path, folder: Path) -> Iterator[Served]:
    port = unused_port()
    env = {"RAY_TMPDIR": str(folder), "RAY_AUTH_MODE": "disabled", "MAX_TOKENS": "120"}
    with (folder / "said").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_serve_driver", str(bundle), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **env},
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Served(process, port)
    finally:
        process.stdin.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)


def unused_port() -> int:
    """One that the system gives to nobody who asks for any, as Ray's processes do meanwhile."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def test_too_many_are_told_to_come_again(served: Served) -> None:
    """Two run, two wait, and the others know at once."""
    first = [served.ask() for _ in range(2)]  # they have begun
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: served.answer(), range(6)))
    assert sorted(status for status, _, _ in answers) == [200] * 2 + [429] * 4
    assert {again for status, again, _ in answers if status == 429} == {"1"}
    texts = {text for status, _, text in answers if status == 200}
    for connection, response in first:
        texts.add(response.read())
        connection.close()
    assert len(texts) == 1
    assert texts.pop()


def test_a_client_that_hangs_up_frees_its_slot(served: Served) -> None:
    connection, response = served.ask()
    assert response.read(1)
    assert served.running() == 1
    began = time.monotonic()
    connection.sock.close()
    response.close()
    while served.running():
        assert time.monotonic() - began < 1.5, "the slot is held as long as the answer takes"
        time.sleep(0.02)


def test_what_runs_ends_before_the_replica_does(served: Served) -> None:
    """The last test here: no replica is left."""
    whole = served.answer()[2]
    connection, response = served.ask()
    begin = response.read(1)
    served.tell("delete")
    assert begin + response.read() == whole
    connection.close()
    assert served._said() == "deleted"
    assert served.answer()[0] in (404, 503)


def test_a_failed_model_is_no_healthy_replica() -> None:
    from examples.ray_serve_app import Service

    class Model:
        def __init__(self, health: str) -> None:
            self.health = lambda: health

    replica: Any = Service.__new__(Service)
    for health in ("ok", "draining"):
        replica._llm = Model(health)
        replica.check_health()
    replica._llm = Model("failed")
    with pytest.raises(RuntimeError, match="the model has failed"):
        replica.check_health()
