"""The engine raises, gives what is no number, hangs or is killed, as its clients see it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_runtime.backends.faulty import Faulty
from llama_runtime.openai_api.requests import ApiRequest
from llama_runtime.server import ServerSettings
from tests.runtime.conftest import FAKE_LLAMA_RUN
from tests.runtime.server.serving import (
    WORK,
    Answer,
    Serving,
    events_of,
    read_answer,
    serving,
    stream_bytes,
)
from tests.watched_backend import PATIENCE, wait_for

SECRET = "/secret/path"  # what an exception may hold, and no answer


def error_of(answer: Answer) -> Any:
    """The one error of an answer, of its body or as the last event of its stream."""
    assert SECRET.encode() not in answer.body
    assert b"Traceback" not in answer.body
    if answer.status != 200:
        return answer.error
    *chunks, last = events_of(answer.body)
    assert all("error" not in chunk for chunk in chunks)
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "param", "code"}
    return last["error"]


def sum_of(server: Serving) -> int:
    """Sequences that run or wait."""
    stats = server.llm.stats()
    return stats.running + stats.waiting


def step(server: Serving, count: int) -> None:
    """So many steps more, of an engine that hangs."""
    server.backend.hang_after(count - 1)
    server.backend.wait_until_it_hangs()


def check_refusing(server: Serving, code: str) -> None:
    """Everybody is told at once that nothing runs, and probes are."""
    started = time.monotonic()
    for path in ("/health", "/ping", "/ready", "/v1/models"):
        answer = server.get(path)
        assert (answer.status, answer.error["code"]) == (503, code)
    for path, body in WORK:
        answer = server.post(path, body)
        assert (answer.status, answer.error["code"]) == (503, code)
        assert int(answer.headers["retry-after"]) >= 1
    assert time.monotonic() - started < 10


def fail_steps(server: Serving) -> None:
    server.backend.failure = ValueError(SECRET)


def kill_turn(server: Serving) -> None:
    """An exception in the worker's thread, wherever that is."""
    _throw_into(server, KeyboardInterrupt)


def kill_thread(server: Serving) -> None:
    """One that ends the thread, because what should catch it fails too."""

    def fail(error: BaseException) -> None:
        raise RuntimeError(SECRET)

    server.llm._worker._fail = fail  # type: ignore[method-assign]
    _throw_into(server, SystemExit)


def _throw_into(server: Serving, kind: type[BaseException]) -> None:
    (thread,) = server.backend.threads
    count = ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(kind)
    )
    assert count == 1


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize(
    ("kill", "code"),
    [(fail_steps, "engine_dead"), (kill_turn, "engine_dead"), (kill_thread, "stopped")],
)
def test_when_the_engine_dies_every_open_request_ends_with_one_error(
    roomy: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill: Callable[[Serving], None],
    code: str,
    steps: int,
) -> None:
    """Streams, whole answers, those that wait, are being prepared, or are still coming."""
    prepared, goes_on = ApiRequest.prepared, threading.Event()

    def slow(self: ApiRequest, *args: Any) -> Any:
        if self.params.max_tokens == 7:
            assert goes_on.wait(PATIENCE)
        return prepared(self, *args)

    monkeypatch.setattr(ApiRequest, "prepared", slow)
    with serving(roomy, max_batch=2) as server, ExitStack() as stack:

        def ask(request: bytes) -> Any:
            connection = stack.enter_context(server.connect())
            connection.sendall(request)
            return connection

        server.backend.hang_after(0)
        running = [ask(stream_bytes(50, stream=stream)) for stream in (True, False)]
        wait_for(lambda: sum_of(server) == 2)
        server.backend.wait_until_it_hangs()
        while len(server.backend.steps[-1]) < 2:  # one alone would be blamed
            step(server, 1)
        step(server, steps)
        waiting = [ask(stream_bytes(50, stream=stream)) for stream in (True, False)]
        wait_for(lambda: sum_of(server) == 4)
        preparing = [ask(stream_bytes(7, stream=stream)) for stream in (True, False)]
        wait_for(lambda: len(server.service.gate.places) == 2)
        late = stream_bytes(50, stream=False)
        coming = ask(late[:-10])
        wait_for(lambda: server.service.num_active == 7)
        kill(server)
        server.backend.go_on()
        for answer in map(read_answer, [*running, *waiting]):
            assert error_of(answer)["code"] == code
            assert answer.status in (200, 503)
        check_refusing(server, code)
        goes_on.set()
        coming.sendall(late[-10:])
        for answer in map(read_answer, [*preparing, coming]):
            assert (answer.status, answer.error["code"]) == (503, code)
        wait_for(lambda: not server.service.num_active and not server.service.gate.places)
        assert server.service.bodies.size == 0


def struck(server: Serving, faults: dict[int, Any], victim: int | None = None) -> Faulty:
    """The server's backend, with faults from now on."""
    faulty = Faulty(SimpleNamespace(run=server.backend.run), faults, victim=victim)
    server.backend.run = faulty.run  # type: ignore[method-assign]
    return faulty


def texts_of(server: Serving, victim: int | None = None) -> list[Any]:
    """The text, or the error, of four requests that share the steps; their sequences are 0 to 3."""
    with ExitStack() as stack:
        clients = []
        server.backend.hang_after(0)
        for number in range(4):
            client = stack.enter_context(server.connect())
            client.sendall(stream_bytes(20, prompt=f"number {number}", stream=number % 2 == 0))
            wait_for(lambda n=number: sum_of(server) == n + 1)  # type: ignore[misc]
            clients.append(client)
        server.backend.go_on()
        answers = [read_answer(client) for client in clients]
    found: list[Any] = []
    for number, answer in enumerate(answers):
        if number == victim:
            found.append(error_of(answer))
        elif number % 2:
            found.append(answer.json()["choices"][0]["text"])
        else:
            *chunks, done = events_of(answer.body)
            assert done == "[DONE]"
            found.append("".join(chunk["choices"][0]["text"] for chunk in chunks))
    server.wait_until_idle()
    return found


@pytest.fixture(scope="module")
def right(roomy: Path) -> list[str]:
    """What the four are answered without any fault."""
    with serving(roomy) as server:
        return texts_of(server)


@pytest.mark.parametrize("kind", ["raise", "nan"])
@pytest.mark.parametrize(("first", "victim"), [(0, 0), (3, 1), (6, 2)])
def test_a_fault_of_one_sequence_fails_that_one_alone(
    roomy: Path, right: list[str], kind: str, first: int, victim: int
) -> None:
    with serving(roomy) as server:
        struck(server, {first: kind}, victim)
        found = texts_of(server, victim)
        error = found.pop(victim)
        assert error["type"] == "server_error"
        assert "told to fail" not in error["message"], "what went wrong inside is for the log"
        assert found == right[:victim] + right[victim + 1 :]
        assert server.get("/ready").status == 200
        assert server.get("/health").status == 200


def test_a_fault_that_does_not_come_again_is_seen_by_nobody(roomy: Path, right: list[str]) -> None:
    with serving(roomy) as server:
        faulty = struck(server, {5: "raise"})
        assert texts_of(server) == right
        assert faulty.num_steps > 5


def test_a_step_that_hangs_shows_in_health_and_requests_end_in_time(
    roomy: Path, right: list[str]
) -> None:
    """And if it ends at last, all is well again."""
    settings = ServerSettings(max_step_time=0.2, request_timeout=0.8)
    with serving(roomy, settings, max_batch=1) as server, ExitStack() as stack:
        assert server.get("/health").status == 200
        server.backend.hang_after(3)
        clients = []
        for stream in (True, False, True, False):
            client = stack.enter_context(server.connect())
            client.sendall(stream_bytes(50, stream=stream))
            clients.append(client)
        server.backend.wait_until_it_hangs()
        assert server.get("/health").status == 200, "a step may take a while"
        wait_for(lambda: server.get("/health").status == 503)
        check_refusing(server, "engine_hangs")
        assert server.get("/metrics").status == 200
        for answer in map(read_answer, clients):
            assert error_of(answer)["code"] == "deadline_exceeded"
            assert answer.status in (200, 504)
        server.backend.go_on()
        wait_for(lambda: server.get("/ready").status == 200)
        assert server.get("/health").status == 200
        server.wait_until_idle()
        assert texts_of(server) == right
        time.sleep(settings.max_step_time or 0)
        assert server.get("/health").status == 200, "nor does an engine hang that has nothing to do"


# --- in a process of its own --------------------------------------------------------------------

_QUICK = """
from llama_runtime import worker
from llama_runtime.server import command
command.CLOSE_SECONDS = worker.EXIT_SECONDS = 0.2
"""


@contextmanager
def process(
    tmp_path: Path, bundle: Path, step_seconds: float, *args: str, port: int = 0
) -> Iterator[tuple[subprocess.Popen[bytes], Serving]]:
    """``llama-run serve``, ready; it waits less long than it would for a step that hangs."""
    script = tmp_path / "run.py"
    script.write_text(_QUICK + FAKE_LLAMA_RUN)
    command = [sys.executable, os.fspath(script), str(step_seconds), "serve", "--port", str(port)]
    command += ["--host", "0.0.0.0", "--insecure"]  # so that any Host may be said
    command += ["--bundle", os.fspath(bundle), "--threads", "1", "--max-len", "512", *args]
    said = tmp_path / "said"
    with said.open("wb") as log, subprocess.Popen(command, stderr=log) as running:
        try:
            wait_for(lambda: running.poll() is not None or "\nready as" in said.read_text())
            (line,) = (one for one in said.read_text().splitlines() if one.startswith("ready as"))
            port = int(line.rpartition(":")[2])
            yield running, Serving(port, None, None, None)  # type: ignore[arg-type]
        finally:
            running.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("step_seconds", "code"), [(3600, "engine_hangs"), (-1, "engine_dead")])
def test_whatever_the_engine_does_sigterm_ends_the_process(
    tmp_path: Path, roomy: Path, step_seconds: int, code: str
) -> None:
    """With status 0; a step that hangs is not waited for as long as one that runs."""
    args = ["--max-step-time", "0.2", "--shutdown-timeout", "60"]
    with process(tmp_path, roomy, step_seconds, *args) as (running, server), ExitStack() as stack:
        clients = [stack.enter_context(server.connect()) for _ in range(2)]
        for stream, client in enumerate(clients):
            client.sendall(stream_bytes(5, stream=bool(stream)))
        wait_for(lambda: server.get("/health").status == 503)
        check_refusing(server, code)
        running.send_signal(signal.SIGTERM)
        answers = [read_answer(client) for client in clients]
        assert {answer.status for answer in answers} <= {500, 503}
        assert all(error_of(answer)["type"] == "server_error" for answer in answers)
        assert running.wait(PATIENCE) == 0
