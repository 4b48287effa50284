"""A process of ``--workers`` over the fake backend: ``python fake_worker.py SECONDS [EVENT]``.

A step takes so many seconds. EVENT is what goes wrong: ``die`` where a prompt holds the word
POISON, ``sick`` at the first row, ``unable`` before it is ready; ``noisy`` prints to standard
output.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from llama_runtime import loading
from llama_runtime.backends.fake import Fake
from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.runners import worker_process
from llama_runtime.batch.runners.runner import LocalRunner
from llama_runtime.errors import CaravanError
from llama_runtime.sampling import Reference

SECONDS, EVENT = float(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""


class SlowFake(Fake):
    """Takes its time."""

    def run(self, step: Any) -> Any:
        time.sleep(SECONDS)
        return super().run(step)


def make(
    _: object, geometry: Any, *, num_slots: int, capacity: int, num_prefix_blocks: int, **__: object
) -> Fake:
    if EVENT == "unable":
        raise CaravanError("there is no such model")
    return SlowFake(num_slots, capacity, geometry.vocab_size, num_prefix_blocks=num_prefix_blocks)


def prepared(self: LocalRunner, record: Record) -> Any:
    if EVENT == "sick" or (EVENT == "die" and "POISON" in record.line.text):
        os.kill(os.getpid(), signal.SIGKILL)
    if EVENT == "noisy":
        os.write(1, b"as libraries do\n")
    return as_it_is(self, record)


as_it_is = LocalRunner._prepared
vars(loading).update(open_session=lambda *_: None, OrtCpu=make, OrtSampler=lambda *_: Reference())
LocalRunner._prepared = prepared  # type: ignore[method-assign]
sys.exit(worker_process.main())
