"""A process that runs rows for a job: ``python -m llama_runtime.batch.runners.worker_process``.

It reads lines of JSON from standard input, first what to load and then a row each, and writes lines
of JSON to standard output: that it is ready, or why it never will be, and then what became of each
row. It ends when it is told to, or at once when whoever started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, BinaryIO

from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.results.outcome import Outcome
from llama_runtime.batch.rows.lines import Line
from llama_runtime.batch.runners.runner import LocalRunner
from llama_runtime.batch.runners.worker_spec import WorkerSpec
from llama_runtime.errors import CaravanError

_PARENT_SECONDS = 0.5  # between looks whether the parent is there
END = b"{}\n"  # no further row comes


def record_message(record: Record) -> bytes:
    """A row as a line."""
    line = record.line
    return _message(
        {"index": record.index, "number": line.number, "text": line.text, "problem": line.problem}
    )


def outcome_of(message: dict[str, Any]) -> Outcome:
    """What a worker says of a row."""
    reasons = tuple(message["finish_reasons"])
    return Outcome(**{**message, "line": message["line"].encode(), "finish_reasons": reasons})


def main() -> int:
    """Run rows until there are no more."""
    global _messages
    _messages = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not stand among the messages
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; our starter decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    spec = json.loads(sys.stdin.buffer.readline())
    if spec["cores"] is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, spec["cores"])
    try:
        llm, form = WorkerSpec.from_json(json.dumps(spec["spec"])).load()
    except CaravanError as error:
        _send({"failed": str(error)})
        return 1
    with llm:
        about = {"max_batch": llm.max_batch, "max_len": llm.max_len, "threads": llm.threads}
        _send({"ready": about})
        try:
            LocalRunner(llm, form).run(_records(), lambda: True, _report)
        except CaravanError as error:
            _send({"failed": str(error)})
            return 1
    return 0


def _records() -> Iterator[Record]:
    for message in sys.stdin.buffer:
        if message == END:
            return
        row = json.loads(message)
        yield Record(row["index"], Line(row["number"], row["text"], row["problem"]))
    os._exit(1)  # whoever started this is gone


def _end_with(parent: int) -> None:
    """End at once when whoever started this is gone: nobody reads what comes of the rows."""
    while os.getppid() == parent:
        time.sleep(_PARENT_SECONDS)
    os._exit(1)


def _report(outcome: Outcome) -> None:
    _send({**asdict(outcome), "line": outcome.line.decode()})


def _send(message: dict[str, Any]) -> None:
    with _sending:
        _messages.write(_message(message))
        _messages.flush()


def _message(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


_sending = threading.Lock()
_messages: BinaryIO = sys.stdout.buffer


if __name__ == "__main__":
    sys.exit(main())
