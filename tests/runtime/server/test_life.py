"""Loading, ready, draining, stopped; and an engine that hangs or dies."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.errors import BackendError
from llama_runtime.server import ServerSettings, Service, request_log
from tests.runtime.conftest import FAKE_LLAMA_RUN
from tests.runtime.server.serving import (
    HELLO,
    MODEL,
    Serving,
    events_of,
    listening,
    read_answer,
    serving,
    stream_bytes,
    watched_models,
)
from tests.watched_backend import PATIENCE, wait_for

GENERATING = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


def refusals(server: Serving) -> set[tuple[int, str]]:
    """What all routes that need the model say."""
    answers = [server.post(path, {"model": MODEL, "prompt": "a"}) for path in GENERATING]
    answers += [server.get("/v1/models"), server.get("/ready")]
    assert all("retry-after" in answer.headers for answer in answers)
    return {(answer.status, answer.error["code"]) for answer in answers}


def test_a_model_that_is_being_loaded_answers_later(roomy: Path) -> None:
    service = Service(ServerSettings())
    with listening(service) as port, watched_models() as backends:
        server = Serving(port, service, None, None)  # type: ignore[arg-type]
        assert refusals(server) == {(503, "loading")}
        assert server.get("/health").status == 200
        assert server.get("/version").status == 200
        service.begin(AsyncLLM(roomy, max_batch=2, max_len=64, threads=1))
        assert server.get("/ready").status == 200
        assert server.get("/v1/models").json()["data"][0]["id"] == MODEL
        asyncio.run(service.llm.close())
        assert refusals(server) == {(503, "stopped")}
        assert server.get("/health").status == 503
        assert backends


def test_health_answers_while_the_engine_is_stuck(roomy: Path) -> None:
    with serving(roomy) as server, server.connect() as connection:
        server.backend.hang_after(0)
        connection.sendall(stream_bytes(2))
        server.backend.wait_until_it_hangs()
        started = time.monotonic()
        for path in ("/health", "/ready", "/version", "/v1/models"):
            assert server.get(path).status == 200
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("failure", [BackendError("the graph failed"), ValueError("/secret/path")])
def test_a_dead_engine_ends_all_that_is_open_once_and_takes_no_more(
    roomy: Path, failure: Exception
) -> None:
    with serving(roomy, max_batch=2) as server:
        server.backend.hang_after(1)
        with server.connect() as streamed, server.connect() as whole, server.connect() as waiting:
            streamed.sendall(stream_bytes(50))
            whole.sendall(stream_bytes(50, stream=False))
            wait_for(lambda: server.llm.stats().running + server.llm.stats().waiting == 2)
            server.backend.hang_after(2)
            server.backend.wait_until_it_hangs()
            waiting.sendall(stream_bytes(50, stream=False))
            wait_for(lambda: server.llm.stats().waiting >= 1)
            server.backend.failure = failure
            server.backend.go_on()
            *_, last = events_of(read_answer(streamed).body) or [None]
            answers = [read_answer(whole), read_answer(waiting)]
        for answer in answers:
            assert (answer.status, answer.error["code"]) == (503, "engine_dead")
            assert b"secret" not in answer.body
        if last is not None:
            assert last["error"]["code"] == "engine_dead"
        assert refusals(server) == {(503, "engine_dead")}
        dead = server.get("/health")
        assert (dead.status, dead.error["code"]) == (503, "engine_dead")
        server.wait_until_idle()


def test_a_drain_cuts_nothing_and_takes_nothing(roomy: Path) -> None:
    with serving(roomy) as server:
        server.backend.seconds = 0.002
        with server.connect() as streamed, server.connect() as whole:
            streamed.sendall(stream_bytes(100))
            whole.sendall(stream_bytes(100, stream=False))
            wait_for(lambda: server.llm.stats().running == 2)
            server.service.refuse()
            assert refusals(server) == {(503, "draining")}
            assert server.get("/health").status == 200
            assert not asyncio.run(server.service.settled(0.01))
            assert events_of(read_answer(streamed).body)[-1] == "[DONE]"
            assert read_answer(whole).json()["usage"]["completion_tokens"] == 100
        server.wait_until_idle()
        assert asyncio.run(server.service.settled(0.01))


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """What the log of requests says."""
    found: list[dict[str, Any]] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(record.getMessage()))

    handler, logger = Keep(), request_log.logger
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)


def test_each_request_is_one_line_of_the_log_without_what_was_said(
    roomy: Path, records: list[dict[str, Any]]
) -> None:
    with serving(roomy) as server:
        body = {"model": MODEL, "prompt": "a secret", "max_tokens": 3, "ignore_eos": True}
        server.post("/v1/completions", body, X_Request_Id="first")
        server.post("/v1/completions", body | {"stream": True, "n": 2})
        server.post("/v1/completions", body | {"n": "x secret"})
        server.get("/v1/models?secret=1")
        with server.connect() as connection:
            connection.sendall(stream_bytes(200, prompt="a secret"))
            connection.recv(1)
        wait_for(lambda: len(records) == 5)
    whole, streamed, wrong, listed, gone = records
    assert (whole["id"], whole["method"], whole["path"]) == ("first", "POST", "/v1/completions")
    assert (whole["status"], whole["prompt_tokens"], whole["completion_tokens"]) == (200, 8, 3)
    assert whole["finish_reasons"] == ["length"]
    assert 0 < whole["first_token_seconds"] <= whole["seconds"] < PATIENCE
    assert (streamed["completion_tokens"], streamed["finish_reasons"]) == (6, ["length"] * 2)
    assert (wrong["status"], wrong["error"]) == (400, "invalid_request_error")
    assert (listed["path"], listed["status"]) == ("/v1/models", 200)
    assert (gone["status"], gone["error"]) == (499, "client_gone")
    assert "secret" not in json.dumps(records)


@contextmanager
def process(
    tmp_path: Path, bundle: Path, seconds: float, *args: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``llama-run serve`` in a process of its own, and where it answers."""
    script = tmp_path / "run.py"
    script.write_text(FAKE_LLAMA_RUN)
    command = [sys.executable, os.fspath(script), str(seconds), "serve", "--port", "0"]
    command += ["--bundle", os.fspath(bundle), "--threads", "1", "--max-len", "2048", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        assert running.stderr is not None
        try:
            for line in running.stderr:
                if line.startswith("ready as"):
                    break
            yield running, line.split()[-1]
        finally:
            running.kill()


def texts(url: str, max_tokens: int, found: list[Any]) -> None:
    """Read a stream to its end: its chunks, and the error if there is one."""
    with openai.OpenAI(api_key="a", base_url=f"{url}/v1", max_retries=0) as client:
        try:
            found.extend(
                client.chat.completions.create(
                    model=MODEL,
                    messages=HELLO,  # type: ignore[arg-type]
                    max_tokens=max_tokens,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
            )
        except openai.APIError as error:
            found.append(error)


@pytest.mark.parametrize(
    ("number", "max_tokens", "patience", "reach"),
    [
        (signal.SIGTERM, 40, "20", ["--host", "0.0.0.0", "--insecure"]),
        (signal.SIGINT, 1900, "0.5", ["--host", "0.0.0.0", "--api-key-file", "keys"]),
    ],
)
def test_a_signal_drains_the_server_and_ends_it(
    tmp_path: Path,
    roomy: Path,
    number: signal.Signals,
    max_tokens: int,
    patience: str,
    reach: list[str],
) -> None:
    """Streams that end in time are whole; the others end with an error event; the status is 0."""
    keys = tmp_path / "keys"
    keys.write_text("a\n")
    keys.chmod(0o600)
    args = [*reach, "--shutdown-timeout", patience]
    with process(tmp_path, roomy, 0.02, *args) as (running, url):
        found: list[list[Any]] = [[] for _ in range(3)]
        threads = [
            threading.Thread(target=texts, args=(url, max_tokens, chunks)) for chunks in found
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: all(found))
        running.send_signal(number)
        told = time.monotonic()
        assert running.stderr is not None
        assert running.stderr.readline().startswith(f"shutting down: 3 requests have {patience} s")
        with (
            openai.OpenAI(api_key="a", base_url=f"{url}/v1", max_retries=0) as client,
            pytest.raises(openai.InternalServerError) as refusal,
        ):
            client.models.list()
        assert refusal.value.status_code == 503
        for thread in threads:
            thread.join(PATIENCE)
        assert running.wait(PATIENCE) == 0
        assert time.monotonic() - told < 15, "it goes when the last one has gone"
    for chunks in found:
        if max_tokens == 40:
            assert chunks[-1].choices[0].finish_reason == "length"
        else:
            assert len(chunks) > 10
            assert isinstance(chunks[-1], openai.APIError)
            assert "shutting down" in str(chunks[-1])


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--host", "0.0.0.0"], 2, "can be reached from other machines: give --api-key-file"),
        (["--host", "no such host"], 2, "can't be found"),
        (["--host", "192.0.2.1", "--insecure"], 1, "can't be listened on"),
        (["--bundle", "nowhere"], 2, "nowhere"),
        (["--api-key-file", "nowhere"], 2, "nowhere can't be read"),
        (["--request-timeout", "0"], 2, "--request-timeout"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    tmp_path: Path, roomy: Path, args: list[str], status: int, words: str
) -> None:
    script = tmp_path / "run.py"
    script.write_text(FAKE_LLAMA_RUN)
    command = [sys.executable, os.fspath(script), "0", "serve", "--port", "0", "--bundle", roomy]
    done = subprocess.run([*map(str, command), *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_its_packages_the_command_names_the_one_that_brings_them(
    tmp_path: Path, roomy: Path
) -> None:
    script = tmp_path / "run.py"
    for missing in ("starlette", "uvicorn"):
        script.write_text(f"import sys; sys.modules[{missing!r}] = None\n" + FAKE_LLAMA_RUN)
        command = [sys.executable, os.fspath(script), "0", "serve", "--bundle", os.fspath(roomy)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert "pip install 'llama-caravan[serve]'" in done.stderr
        assert len(done.stderr.splitlines()) == 1
