"""Result files: whole lines only, whatever the disk or Ctrl-C does."""

from __future__ import annotations

import errno
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from llama_runtime.batch.results.output_file import OutputFile
from llama_runtime.errors import CaravanError


def test_an_old_file_stays_as_it_is_until_a_line_comes_and_lines_are_added(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    file = OutputFile(path)
    assert (file.num_bytes, path.read_text()) == (4, "old\n")
    file.write(b"new\n")
    assert path.read_text() == "old\nnew\n"
    file.close()
    assert (file.cut(5), file.num_bytes, path.read_text()) == (3, 5, "old\nn")


class FullDisk(io.FileIO):
    """Takes some bytes, then none."""

    room = 25

    def write(self, data: Any, /) -> int:
        taken = bytes(data[: self.room])
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(taken)
        return super().write(taken) or 0


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(OutputFile, "_open", lambda _: FullDisk(path, "ab"))
    results = OutputFile(path)
    results.write(b"0123456789\n")
    results.write(b"0123456789\n")
    with pytest.raises(CaravanError, match="No space left"):
        results.write(b"0123456789\n")
    assert path.read_bytes() == b"0123456789\n" * 2
    assert results.lines == 2
    results.close()


def test_standard_output_is_never_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"what was there before\n")
    shell = os.open(path, os.O_WRONLY | os.O_APPEND)  # as `>>` opens it: it stands at 0
    with FullDisk(shell, "wb") as appended:
        monkeypatch.setattr(OutputFile, "_open", lambda _: appended)
        with pytest.raises(CaravanError, match="No space left"):
            OutputFile(None).write(b"0123456789" * 5)
    assert path.read_bytes().startswith(b"what was there before\n01234")


def test_ctrl_c_in_the_middle_of_a_line_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(io.FileIO):
        def write(self, data: Any, /) -> int:
            if len(data) == 4:
                signal.raise_signal(signal.SIGINT)
            return super().write(data[:2]) or 0

    monkeypatch.setattr(OutputFile, "_open", lambda _: Interrupted(tmp_path / "out", "ab"))
    results = OutputFile(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        results.write(b"123\n")
    results.close()
    assert (tmp_path / "out").read_bytes() == b"123\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_the_disk_refuses_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = OutputFile(tmp_path / "out")
    file.write(b"a\n")
    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "truncate", refuse)
    for act in (file.sync, lambda: file.cut(0)):
        with pytest.raises(CaravanError, match=r"^can't write to .*out: Input/output error$"):
            act()
    file.close()
