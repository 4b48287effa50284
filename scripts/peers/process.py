"""A worker's process, seen from the benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
SECONDS_TO_LOAD, SECONDS_TO_ANSWER = 600, 1800
SECONDS_TO_END = 20
# Workers are told their threads; the caller's own settings would slow some of them only.
UNSET = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT")

Results = dict[str, Any]


class WorkerError(Exception):
    """A worker that can't be used any more, or didn't do what was asked, in one sentence."""


class Worker:
    """A process that has its model loaded.

    Args:
        command: what starts it, the peer's interpreter first.
        log: where its standard error goes.

    Raises:
        WorkerError: it ended, or didn't load in time.
    """

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if name not in UNSET}
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**kept, "HF_HUB_OFFLINE": "1"},
            )
        try:
            self.settings: Results = self._read(SECONDS_TO_LOAD)["settings"]
        except BaseException:
            self.close()
            raise

    def ask(self, request: Results) -> Results:
        """One answer.

        Raises:
            WorkerError: the request failed, or the process ended or took too long.
        """
        try:
            self._pipe(self._child.stdin).write(json.dumps(request) + "\n")
            self._pipe(self._child.stdin).flush()
        except OSError:
            raise WorkerError(self._last_words()) from None
        return self._read(SECONDS_TO_ANSWER)

    def generate(self, prompts: list[str], max_new_tokens: list[int]) -> float:
        """Seconds of one call, which made all tokens that were asked for.

        Raises:
            WorkerError: as for ``ask``, or it made fewer or more.
        """
        answer = self.ask({"prompts": prompts, "max_new_tokens": max_new_tokens})
        made, wanted = answer["output_tokens"], sum(max_new_tokens)
        if made != wanted or len(answer["texts"]) != len(prompts):
            raise WorkerError(f"it made {made} tokens, {wanted} were asked for")
        return float(answer["seconds"])

    def cpu_seconds(self) -> float:
        """What all its threads have computed so far; 0 where the system doesn't say."""
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._pipe(self._child.stdin).close()
        try:
            self._child.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._pipe(self._child.stdout).close()

    def _read(self, seconds: float) -> Results:
        guard = threading.Timer(seconds, self._child.kill)
        guard.start()
        line = self._pipe(self._child.stdout).readline()
        in_time = guard.is_alive()
        guard.cancel()
        if not line:
            raise WorkerError(self._last_words() if in_time else f"it took over {seconds:g} s")
        answer: Results = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        status = self._child.wait(SECONDS_TO_END)  # its pipe is closed
        return f"it ended with status {status}: {last_line(self._log.read_text(errors='replace'))}"

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def last_line(text: str) -> str:
    """The last line that isn't empty, which is where tools say what went wrong."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
