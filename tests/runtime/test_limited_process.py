"""A process with limits, and the program that asks it."""

from __future__ import annotations

import os
import threading
import time

import pytest

from llama_runtime import limited_process
from llama_runtime.limited_process import LimitedProcess


@pytest.fixture
def echo() -> LimitedProcess:
    return LimitedProcess("tests.runtime.slow_echo", "answers slowly")


def test_long_messages_pass_whole(echo: LimitedProcess) -> None:
    for size in (0, 1, 2**16, 3_000_001):
        message = b"0 " + os.urandom(size)
        assert echo.ask(message) == message
    echo.close()


def test_a_crash_is_no_answer_and_the_next_request_gets_one(echo: LimitedProcess) -> None:
    assert echo.ask(b"crash") is None
    assert echo.ask(b"0 a") == b"0 a"
    echo.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_waits_for_an_answer(echo: LimitedProcess) -> None:
    """The child must not wait for what that thread holds, nor write into the parent's pipes."""
    answers: list[bytes | None] = []
    asking = threading.Thread(target=lambda: answers.append(echo.ask(b"0.5 a")))
    asking.start()
    time.sleep(0.2)
    child = os.fork()
    if child == 0:
        os._exit(0 if echo.ask(b"0 mine") == b"0 mine" else 1)
    end = time.monotonic() + 10
    status = None
    while status is None and time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        status = code if done else None
        time.sleep(0.01)
    if status is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == 0
    asking.join()
    assert answers == [b"0.5 a"]
    assert echo.ask(b"0 b") == b"0 b"
    echo.close()


def test_all_processes_end_with_the_program(echo: LimitedProcess) -> None:
    echo.ask(b"0 a")
    process = echo._process
    assert process is not None
    limited_process._close_all()
    assert process.poll() is not None
