"""One process that runs rows for a job, from the side of whoever started it."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from typing import Any, BinaryIO, TypeAlias

from llama_runtime.batch.forms.formats import Record
from llama_runtime.batch.runners.places import Place
from llama_runtime.batch.runners.worker_process import END, record_message
from llama_runtime.errors import one_line

Inbox: TypeAlias = "queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]]"

COMMAND = (sys.executable, "-m", "llama_runtime.batch.runners.worker_process")
AHEAD = 2  # rows in a process for each of its slots, so that it needn't wait for the next ones
_END_SECONDS = 5.0  # in which a process without rows ends by itself
_LOG_BYTES = 4_000  # of what a process said last


class Worker:
    """One process, and the rows that it runs.

    Args:
        place: what it loads, and where it runs.
        inbox: where its messages go, each with the worker; None says that it has ended.

    Attributes:
        rows: those that it was given and hasn't answered, by index.
        num_slots: sequences that it runs at once; 0 until it is ready.
        about: what it has to work with.
        group: how many rows it was given that may have killed another process, and may not be
            joined by others; 0 if it runs any.
        failure: why it gave up, if it said so.
    """

    def __init__(self, place: Place, inbox: Inbox) -> None:
        self.place = place
        self.rows: dict[int, Record] = {}
        self.num_slots = 0
        self.about: dict[str, Any] = {}
        self.group = 0
        self.failure: str | None = None
        self._inbox = inbox
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )
        spec = {"spec": json.loads(place.spec.to_json()), "cores": place.cores}
        self._send(json.dumps(spec).encode() + b"\n")
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs; that it doesn't may be known before it is told."""
        return self._process.poll() is None

    @property
    def room(self) -> int:
        """How many further rows it should get."""
        if self.group:
            return 0
        return AHEAD * self.num_slots - len(self.rows)

    def run(self, record: Record) -> None:
        """Give it a row."""
        self.rows[record.index] = record
        self._send(record_message(record))

    def run_group(self, records: list[Record]) -> None:
        """Give it rows, and no others until all of them have ended."""
        self.group = len(records)
        for record in records:
            self.run(record)

    def close(self) -> None:
        """End it: it keeps nothing that must be written."""
        if not self.rows:
            self._send(END)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_SECONDS)
        self._process.kill()
        self._process.wait()
        self._release()

    def last_words(self) -> str:
        """How it ended, in a few words; it has ended."""
        status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"status {status}"
        self._log.seek(max(0, self._log.seek(0, 2) - _LOG_BYTES))
        said = self.failure or self._log.read().decode(errors="replace").strip().rpartition("\n")[2]
        self._release()
        return f"{how}: {one_line(said)}" if said else how

    def _release(self) -> None:
        """Close what belongs to a process that has ended."""
        self._listener.join()
        for file in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):  # what it wasn't there to read any more
                if file is not None:
                    file.close()

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except (OSError, ValueError):  # it has died, which its silence will tell
            pass

    def _listen(self) -> None:
        assert self._process.stdout is not None
        stream: BinaryIO = self._process.stdout  # type: ignore[assignment]
        for line in stream:
            if not line.endswith(b"\n"):  # it died while it spoke
                break
            self._inbox.put((self, json.loads(line)))
        self._inbox.put((self, None))
