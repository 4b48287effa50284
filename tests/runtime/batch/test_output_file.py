"""Result files: whole lines only, and nothing is lost or overwritten by accident."""

from __future__ import annotations

import errno
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.batch.results import InOrder, ResultFile
from llama_runtime.batch.rows import Source
from llama_runtime.errors import CaravanError, RequestError


@given(st.permutations(range(12)))
def test_lines_pass_in_order_and_as_soon_as_order_allows(arrivals: list[int]) -> None:
    written: list[bytes] = []
    in_order = InOrder(written.append)
    for count, index in enumerate(arrivals, 1):
        in_order.add(index, b"%d" % index)
        seen = set(arrivals[:count])
        expected = next(i for i in range(13) if i not in seen)
        assert written == [b"%d" % i for i in range(expected)]
        assert in_order.num_waiting == count - expected


def job_output(tmp_path: Path, name: str, output: str | None = None, force: bool = False) -> Any:
    prompts = tmp_path / name
    prompts.write_text("prompt\n")
    return ResultFile.for_job(Source(prompts), output, force=force)


def test_the_default_output_lies_beside_the_prompts(tmp_path: Path) -> None:
    assert job_output(tmp_path, "a.txt").path == tmp_path / "a.results.jsonl"
    assert job_output(tmp_path, "b.jsonl").path == tmp_path / "b.results.jsonl"
    assert job_output(tmp_path, "c.txt", "-").path is None
    assert ResultFile.for_job(Source(None), None, force=False).path is None


def test_an_output_that_can_not_be_used_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.results.jsonl").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError, match=r"a\.results\.jsonl exists: give --force"):
        job_output(tmp_path, "a.txt")
    for force in (False, True):
        with pytest.raises(RequestError, match="is the prompts file"):
            job_output(tmp_path, "b.txt", str(tmp_path / "folder" / ".." / "b.txt"), force)
        with pytest.raises(RequestError, match="is a directory"):
            job_output(tmp_path, "c.txt", str(tmp_path), force)
        with pytest.raises(RequestError, match="its folder does not exist"):
            job_output(tmp_path, "d.txt", str(tmp_path / "no" / "out"), force)
        with pytest.raises(RequestError, match="can't be written"):
            job_output(tmp_path, "e.txt", "x" * 5000, force)


def test_an_old_file_stays_until_the_first_result(tmp_path: Path) -> None:
    old = tmp_path / "a.results.jsonl"
    old.write_text("old\n")
    results = job_output(tmp_path, "a.txt", force=True)
    assert old.read_text() == "old\n"
    results.write(b"new\n")
    assert old.read_text() == "new\n"
    results.close()


def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    results = job_output(tmp_path, "a.txt")
    (tmp_path / "a.results.jsonl").write_text("somebody's\n")
    with pytest.raises(CaravanError, match="File exists"):
        results.write(b"mine\n")
    assert (tmp_path / "a.results.jsonl").read_text() == "somebody's\n"


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
    monkeypatch.setattr(ResultFile, "_open", lambda _: FullDisk(path, "wb"))
    results = ResultFile(path, force=False)
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
        monkeypatch.setattr(ResultFile, "_open", lambda _: appended)
        with pytest.raises(CaravanError, match="No space left"):
            ResultFile(None, force=False).write(b"0123456789" * 5)
    assert path.read_bytes().startswith(b"what was there before\n01234")


def test_ctrl_c_in_the_middle_of_a_line_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(io.FileIO):
        def write(self, data: Any, /) -> int:
            if len(data) == 4:
                signal.raise_signal(signal.SIGINT)
            return super().write(data[:2]) or 0

    monkeypatch.setattr(ResultFile, "_open", lambda _: Interrupted(tmp_path / "out", "wb"))
    results = ResultFile(tmp_path / "out", force=False)
    with pytest.raises(KeyboardInterrupt):
        results.write(b"123\n")
    results.close()
    assert (tmp_path / "out").read_bytes() == b"123\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
