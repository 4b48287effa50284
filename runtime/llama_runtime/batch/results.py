"""Results: one JSON object a line, whole and in order whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import BinaryIO

from llama_runtime.batch.rows import Row, Source
from llama_runtime.completion import Completion
from llama_runtime.errors import CaravanError, RequestError
from llama_runtime.interrupts import Held
from llama_runtime.sequence import TokenLogprob


def result_line(row: Row, completions: Seq[Completion], seed: int | None) -> bytes:
    """One line of the output: UTF-8 JSON and a line end.

    Args:
        row: what was asked.
        completions: what became of it, one or all ``n``.
        seed: the random stream that would have been used; None takes the first completion's.
    """
    first = completions[0]
    samples = [_sample(completion) for completion in completions]
    record: dict[str, object] = {"index": row.index, "prompt": row.prompt}
    record |= samples[0] if len(samples) == 1 else {"samples": samples}
    if first.prompt_logprobs is not None:
        record["prompt_logprobs"] = [item and _logprob(item) for item in first.prompt_logprobs]
    record["usage"] = {
        "prompt_tokens": first.num_prompt_tokens,
        "completion_tokens": sum(len(completion.token_ids) for completion in completions),
    }
    record["seed"] = first.seed if seed is None else seed
    errors = [str(completion.error) for completion in completions if completion.error is not None]
    record["error"] = errors[0] if errors else None
    return json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n"


def _sample(completion: Completion) -> dict[str, object]:
    """What belongs to one completion; what wasn't asked for is left out."""
    record: dict[str, object] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if completion.stop_text is not None:
        record["stop_text"] = completion.stop_text
    if completion.logprobs is not None:
        record["logprobs"] = [_logprob(item) for item in completion.logprobs]
    return record


def _logprob(item: TokenLogprob) -> dict[str, object]:
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in item.top]
    return {"token_id": item.token_id, "logprob": item.logprob} | ({"top": top} if top else {})


class InOrder:
    """Passes lines on in the order of their index, each as soon as those before it are there.

    Args:
        write: takes each line.
    """

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._waiting: dict[int, bytes] = {}
        self.written = 0

    @property
    def num_waiting(self) -> int:
        """Lines that wait for an earlier one."""
        return len(self._waiting)

    def add(self, index: int, line: bytes) -> None:
        """Take the line of a row, the only one with this index."""
        self._waiting[index] = line
        while self.written in self._waiting:
            self._write(self._waiting[self.written])
            del self._waiting[self.written]
            self.written += 1


class ResultFile:
    """Where the lines go: a file that is opened when the first one comes, or standard output.

    Args:
        path: the file; None for standard output.
        force: whether a file that exists is replaced.

    Attributes:
        lines: how many have been written.
    """

    def __init__(self, path: Path | None, *, force: bool) -> None:
        self.path = path
        self.lines = 0
        self._force = force
        self._file: BinaryIO | None = None

    def __str__(self) -> str:
        return "standard output" if self.path is None else str(self.path)

    @classmethod
    def for_job(cls, source: Source, output: str | None, *, force: bool) -> ResultFile:
        """The output of a job, checked as far as it can be without touching it.

        Args:
            source: where the prompts come from.
            output: a file name, ``-`` for standard output, or None for the default: beside a file
                of prompts, and standard output for a stream.
            force: whether a file that exists is replaced.

        Raises:
            RequestError: the file can't be written, is there already or is that of the prompts.
        """
        if output == "-" or (output is None and source.is_stream):
            return cls(None, force=force)
        if output is not None:
            path = Path(output)
        else:
            path = (source.path or Path()).with_suffix(".results.jsonl")
        try:
            _check_output(path, source, force=force)
        except OSError as error:
            raise _refuse(f"the output {path} can't be written: {error.strerror}") from error
        return cls(path, force=force)

    def write(self, line: bytes) -> None:
        """Write one line and hand it to the system.

        A line that doesn't get through whole is taken back from a file.

        Raises:
            CaravanError: the system refuses.
            BrokenPipeError: whoever read the output has gone.
        """
        with Held():
            try:
                if self._file is None:
                    self._file = self._open()
                if self.path is None:
                    _write_whole(self._file, line)
                else:
                    _write_or_take_back(self._file, line)
                self.lines += 1
            except BrokenPipeError:
                raise
            except OSError as error:
                raise CaravanError(f"can't write to {self}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None and self.path is not None:
            self._file.close()

    def _open(self) -> BinaryIO:
        if self.path is None:
            return sys.stdout.buffer
        is_device = self.path.exists() and not self.path.is_file()
        return self.path.open("wb" if self._force or is_device else "xb", buffering=0)


def _check_output(path: Path, source: Source, *, force: bool) -> None:
    if path.is_dir():
        raise _refuse(f"the output {path} is a directory")
    if not path.parent.is_dir():
        raise _refuse(f"the output {path} can't be written: its folder does not exist")
    if path.exists() and source.path is not None and path.samefile(source.path):
        raise _refuse(f"the output {path} is the prompts file")
    if path.is_file() and not force:
        raise _refuse(
            f"the output {path} exists: give --force to replace it, or --output to write elsewhere"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _refuse(f"the output {path} can't be written: permission denied")


def _refuse(message: str) -> RequestError:
    return RequestError(message, param="output")


def _write_whole(file: BinaryIO, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[file.write(rest) :]
    file.flush()


def _write_or_take_back(file: BinaryIO, line: bytes) -> None:
    """Write a line, or remove the part of it that a full disk had room for."""
    start = file.tell() if file.seekable() else None
    try:
        _write_whole(file, line)
    except OSError:
        if start is not None:
            with contextlib.suppress(OSError):
                file.truncate(start)
        raise
