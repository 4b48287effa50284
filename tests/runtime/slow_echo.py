"""A program for test_limited_process: says what it is told, after so many seconds."""

from __future__ import annotations

import os
import time

from llama_runtime.limited_process import serve


def main() -> None:
    serve(_answer, cpu_seconds=5, memory_bytes=2**30)


def _answer(request: bytes) -> bytes:
    if request == b"crash":
        os.abort()
    time.sleep(float(request.split(b" ", 1)[0]))
    return request
