"""Several processes that run the rows of one job: a queue for all, and a model in each.

A process that dies is started again. The rows that it was running run once more, in a process that
runs no others meanwhile. If that dies too, they are split into smaller and smaller groups, until
the row that kills it is alone; it is reported as failed, and the others aren't.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, TypeAlias

from llama_runtime.batch.formats import Format, Record
from llama_runtime.batch.outcome import Outcome
from llama_runtime.batch.prefetch import Prefetch
from llama_runtime.batch.runner import Finish, HasRoom
from llama_runtime.batch.worker_process import END, outcome_of, record_message
from llama_runtime.batch.worker_spec import WorkerSpec
from llama_runtime.errors import BackendError, CapacityError, CaravanError, RequestError, one_line
from llama_runtime.machine import default_threads
from llama_runtime.memory_plan import MemoryPlan, megabytes
from llama_runtime.shared_engine import Stats

Inbox: TypeAlias = "queue.SimpleQueue[tuple[Worker, dict[str, Any] | None]]"

COMMAND = (sys.executable, "-m", "llama_runtime.batch.worker_process")
AHEAD = 2  # rows in a process for each of its slots, so that it needn't wait for the next ones
SPLIT = 8  # groups that rows which killed two processes are split into, again and again
MAX_DEATHS = 8  # of processes, with no row that ended between them
_POLL_SECONDS = 0.1  # in which a row that comes by a slow stream is noticed
_END_SECONDS = 5.0  # in which a process without rows ends by itself
_LOG_BYTES = 4_000  # of what a process said last


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker may use of the machine.

    Attributes:
        spec: what it loads.
        cores: processors; None for those of this process.
    """

    spec: WorkerSpec
    cores: list[int] | None = None


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


class WorkerPool:
    """Runs rows in several processes; see ``RowRunner``.

    Args:
        places: one for each process.
        form: how rows that a process died of are reported.

    Attributes:
        num_deaths: of processes, so far.

    Raises:
        BackendError: a process can't load the model.
    """

    def __init__(self, places: list[Place], form: Format) -> None:
        self._form = form
        self._inbox: Inbox = queue.SimpleQueue()
        self._workers: list[Worker] = []
        self._suspects: deque[list[Record]] = deque()  # groups of rows that killed a process
        self._finish: Finish = lambda _: None
        self._broken_off: CaravanError | None = None  # why no further rows can be read
        self._is_complete = False
        self._prompt_tokens = self._completion_tokens = 0
        self.num_deaths = self._deaths_in_a_row = 0
        try:
            for place in places:  # one after the other: each looks what memory the others left
                self._workers.append(Worker(place, self._inbox))
                while not self._workers[-1].num_slots:
                    self._take_message(wait=True)
            self._is_complete = True
        except BaseException:
            self.close()
            raise

    @property
    def num_slots(self) -> int:
        """Sequences that may run at once, in all processes."""
        return sum(worker.num_slots for worker in self._workers)

    @property
    def about(self) -> dict[str, Any]:
        """What a process has to work with."""
        return {"workers": len(self._workers), **self._workers[0].about}

    def stats(self) -> Stats:
        """How much was done; the tokens of a row count when it ends."""
        running = sum(min(len(each.rows), each.num_slots) for each in self._workers)
        return Stats(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            running=running,
        )

    def run(self, records: Iterator[Record], has_room: HasRoom, finish: Finish) -> None:
        """See ``RowRunner.run``."""
        self._finish, self._broken_off = finish, None
        rows = Prefetch(records, max(AHEAD * self.num_slots, 1))
        try:
            are_left = True
            while are_left or self._suspects or self._is_busy:
                are_left = are_left and self._hand_out(rows, has_room)
                self._retry_suspects()
                if are_left or self._suspects or self._is_busy:
                    self._take_message(wait=not are_left)
        finally:
            rows.close()
        if self._broken_off is not None:
            raise self._broken_off

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()

    @property
    def _is_busy(self) -> bool:
        return any(worker.rows for worker in self._workers)

    def _hand_out(self, rows: Prefetch[Record], has_room: HasRoom) -> bool:
        """Give rows to those who have room; whether there may be more rows."""
        while not self._is_busy or has_room():
            worker = max(self._workers, key=lambda each: each.room)
            if worker.room <= 0 or (self._suspects and not worker.rows):
                break
            try:
                record = rows.take(wait=not self._is_busy)
            except StopIteration:
                return False
            except CaravanError as error:
                self._broken_off = error  # what runs is to end first
                return False
            if record is None:
                break
            worker.run(record)
        return True

    def _retry_suspects(self) -> None:
        for worker in self._workers:
            if self._suspects and worker.num_slots and not worker.rows:
                worker.run_group(self._suspects.popleft())

    def _take_message(self, *, wait: bool) -> None:
        try:
            worker, message = self._inbox.get(timeout=None if wait else _POLL_SECONDS)
        except queue.Empty:
            return
        if message is None:
            self._replace(worker)
        elif "ready" in message:
            worker.about = message["ready"]
            worker.num_slots = worker.about["max_batch"]
        elif "failed" in message:
            worker.failure = message["failed"]
        else:
            self._take_outcome(worker, outcome_of(message))

    def _take_outcome(self, worker: Worker, outcome: Outcome) -> None:
        del worker.rows[outcome.index]
        if not worker.rows:
            worker.group = 0
        self._deaths_in_a_row = 0
        self._prompt_tokens += outcome.prompt_tokens
        self._completion_tokens += outcome.completion_tokens
        self._finish(outcome)

    def _replace(self, worker: Worker) -> None:
        """Start a process again that has died."""
        words = worker.last_words()
        if not self._is_complete:
            raise BackendError(f"a process of --workers can't start: {words}")
        self.num_deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > MAX_DEATHS:
            raise BackendError(f"the processes of --workers die one after the other: {words}")
        rows = sorted(worker.rows.values(), key=lambda record: record.index)
        if worker.group == 1:
            self._deaths_in_a_row = 0  # the culprit is known
            self._fail(rows[0], words)
        elif rows:
            size = -(-len(rows) // SPLIT) if worker.group else len(rows)
            groups = [rows[at : at + size] for at in range(0, len(rows), size)]
            self._suspects.extendleft(reversed(groups))
        self._workers[self._workers.index(worker)] = Worker(worker.place, self._inbox)

    def _fail(self, record: Record, words: str) -> None:
        error = BackendError(
            "several processes died while they ran this row, the last one when it ran nothing else "
            f"({words})"
        )
        line = self._form.failure(record, error, ())
        self._finish(Outcome(record.index, line, str(error), 0, 0, ("error",), None))


def check_memory(plan: MemoryPlan, count: int, *, on_gpu: bool) -> None:
    """Refuse what doesn't fit into memory as often as it is wanted.

    Args:
        plan: of one process.
        count: how many there are.
        on_gpu: whether each has a device of its own.

    Raises:
        CapacityError: it doesn't fit.
    """
    plan.check()
    if not on_gpu and count * plan.total > plan.available.num_bytes:
        raise CapacityError(
            f"{count} workers need {megabytes(count * plan.total)}, {megabytes(plan.total)} each, "
            f"and {megabytes(plan.available.num_bytes)} are available: give fewer, or a smaller "
            "--max-batch",
            param="workers",
        )


def places(spec: WorkerSpec, count: int, *, on_gpu: bool) -> list[Place]:
    """Share the machine out: a device each, or a group of processors.

    Args:
        spec: what each loads; its threads and devices are those of all together, if given.
        count: how many processes.
        on_gpu: whether they run on devices.

    Raises:
        RequestError: there are fewer devices than processes.
    """
    if on_gpu:
        devices = list(range(count)) if spec.devices is None else spec.devices
        if len(devices) != count:
            raise RequestError(
                f"{count} workers need as many devices, not {len(devices)}: a process has one each",
                param="workers",
            )
        return [Place(replace(spec, devices=[device])) for device in devices]
    threads = max(1, (spec.threads or default_threads()) // count)
    each = replace(spec, threads=threads)
    if not hasattr(os, "sched_setaffinity"):
        return [Place(each) for _ in range(count)]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count * threads:
        return [Place(each) for _ in range(count)]
    groups = [cores[i * len(cores) // count : (i + 1) * len(cores) // count] for i in range(count)]
    return [Place(each, group) for group in groups]
