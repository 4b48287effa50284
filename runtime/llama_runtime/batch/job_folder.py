"""The folder beside the output of a job: all that it takes to go on after an interruption.

The folder of ``prompts.results.jsonl`` is ``prompts.results.jsonl.job``. In it are ``job.json``,
what the job was begun with and what a first look at its rows found; ``progress.json``, how far it
was when the output was last brought to the disk; ``ahead.jsonl``, results that wait for those of
earlier rows; ``retries.jsonl``, results of rows that are done again, until they replace the first
ones; ``input``, the rows, where they came from a stream; and ``summary.json``, how it went.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from llama_runtime.errors import CaravanError, RequestError

VERSION = 1


class JobFolder:
    """The files of one job.

    Args:
        output: the result file that the folder lies beside.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".job")
        self.errors = errors_path(output)
        self.ahead = self.path / "ahead.jsonl"
        self.retries = self.path / "retries.jsonl"
        self.input = self.path / "input"
        self.new_input = self.path / "input.new"  # of a job that hasn't begun yet
        self.index = self.path / "ids.sqlite"
        self.echoes = self.path / "echoes"
        self.summary = self.path / "summary.json"
        self._job = self.path / "job.json"
        self._progress = self.path / "progress.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other runs out of the job until the block ends.

        Raises:
            RequestError: another run has it, or the folder can't be made.
        """
        try:
            self.path.mkdir(exist_ok=True)
            file = (self.path / "lock").open("wb")
        except OSError as error:
            raise _refuse(f"the folder {self.path} can't be used: {error.strerror}") from error
        with file:
            try:
                _lock(file)
            except (BlockingIOError, PermissionError) as error:  # the second on Windows
                raise _refuse(
                    f"another run is writing to {self.output}: wait for it, or give --output"
                ) from error
            except OSError as error:  # a file system without locks
                raise _refuse(
                    f"{file.name} can't be locked against other runs: {error.strerror}; give "
                    "--output a file elsewhere"
                ) from error
            try:
                yield
            finally:
                self._leave_nothing()

    def _leave_nothing(self) -> None:
        """Remove the folder of a job that never began: an empty file should leave none."""
        if [path.name for path in self.path.iterdir()] == ["lock"]:
            with suppress(OSError):  # such as that of a file system where it is in use
                (self.path / "lock").unlink()
                self.path.rmdir()

    def read(self) -> dict[str, Any] | None:
        """What ``write`` wrote, or None if no job has begun.

        Raises:
            RequestError: it can't be understood.
        """
        found = _read(self._job)
        if found is not None and found.get("version") != VERSION:
            raise _refuse(
                f"{self._job} is of version {found.get('version')!r:.20}, and this Caravan writes "
                f"{VERSION}: finish the job with the other one, or give --force to begin anew"
            )
        return found

    def write(self, job: Mapping[str, Any]) -> None:
        """Keep what the job was begun with."""
        _write(self._job, {"version": VERSION, **job})

    def read_progress(self) -> dict[str, Any]:
        """What ``write_progress`` wrote last; nothing if it never did."""
        return _read(self._progress) or {}

    def write_progress(self, progress: Mapping[str, Any]) -> None:
        """Keep how far the job is."""
        _write(self._progress, progress)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Keep how it went."""
        _write(self.summary, summary, indent=2)

    def read_summary(self) -> dict[str, Any] | None:
        """What ``write_summary`` wrote last, or None."""
        return _read(self.summary)

    def clear(self, results: Iterable[Path]) -> None:
        """Remove the job and its results, so that it can begin anew, with its new input if any.

        Args:
            results: the files that are those of the job.
        """
        kept = ("lock", self.new_input.name)
        for path in results:
            if path.is_file():
                path.unlink()
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.new_input.exists():
            os.replace(self.new_input, self.input)


def _lock(file: IO[bytes]) -> None:
    """Take a file that nobody else has, until it is closed.

    Raises:
        OSError: somebody has it, or files can't be taken there.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def errors_path(output: Path) -> Path:
    """Where the errors go that are kept apart from the output."""
    stem = output.name.removesuffix(".jsonl")
    return output.with_name(f"{stem}.errors.jsonl")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _refuse(f"{path} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise _refuse(f"{path} can't be read: it is no object")
    return value


def _write(path: Path, value: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a file whole, or leave the one that is there."""
    text = json.dumps(value, ensure_ascii=False, indent=indent) + "\n"
    scratch = path.with_suffix(".new")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise CaravanError(f"can't write to {path}: {error.strerror}") from error


def _refuse(message: str) -> RequestError:
    return RequestError(message, param="output")
