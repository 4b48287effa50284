"""Where results go: beside the rows, and never over something that nobody gave up."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_runtime.batch.job_folder import JobFolder, errors_path
from llama_runtime.batch.results.destination import (
    can_resume,
    check_report,
    check_unused,
    destination,
)
from llama_runtime.batch.rows.source import Source
from llama_runtime.errors import RequestError


def place(tmp_path: Path, name: str, output: str | None = None) -> Path | None:
    prompts = tmp_path / name
    prompts.write_text("prompt\n")
    return destination(Source(prompts), output)


def test_the_default_output_lies_beside_the_prompts(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "a.TXT.GZ", "a.parquet", "a", "a.gz"):
        assert place(tmp_path, name) == tmp_path / "a.results.jsonl"
    assert place(tmp_path, "c.txt", "-") is None
    assert destination(Source(None), None) is None


def test_an_output_that_can_not_be_used_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    itself = str(tmp_path / "folder" / ".." / "b.txt")
    for output, words in (
        (itself, "would replace the prompts file"),
        (str(tmp_path), "is a directory"),
        (str(tmp_path / "no" / "out"), "its folder does not exist"),
        ("x" * 5000, "can't be written"),
    ):
        with pytest.raises(RequestError, match=words) as refusal:
            place(tmp_path, "b.txt", output)
        assert refusal.value.param == "output"


def test_no_file_that_the_job_writes_may_be_that_of_the_rows(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    folder = JobFolder(output)
    folder.path.mkdir()
    for path in (errors_path(output), folder.input):
        path.write_text("prompt\n")
        with pytest.raises(RequestError, match="would replace the prompts file"):
            destination(Source(path), str(output))
    link = tmp_path / "link.jsonl"
    link.symlink_to(errors_path(output))
    with pytest.raises(RequestError, match="would replace the prompts file"):
        destination(Source(link), str(output))


def test_a_file_that_is_not_that_of_a_job_is_not_overwritten(tmp_path: Path) -> None:
    check_unused(tmp_path / "out")
    (tmp_path / "out").write_text("somebody's\n")
    with pytest.raises(RequestError, match=r"exists, and is not that of a job .* give --force"):
        check_unused(tmp_path / "out")


def test_only_a_file_keeps_what_a_job_needs_to_go_on(tmp_path: Path) -> None:
    assert can_resume(tmp_path / "new")
    assert can_resume(Path(__file__))
    assert not can_resume(Path("/dev/null"))
    assert not can_resume(None)


def test_standard_output_has_several_names(tmp_path: Path) -> None:
    """Else a job would keep its folder in /dev, and ``--force`` would remove what is there."""
    for name in ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        assert place(tmp_path, "c.txt", name) is None


def test_a_page_that_can_not_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    rows, output = tmp_path / "a.txt", tmp_path / "out.jsonl"
    rows.write_text("prompt\n")
    (tmp_path / "link").symlink_to(rows)
    check_report(tmp_path / "page.html", Source(rows), output)
    check_report(tmp_path / "page.html", Source(None), None)
    for page in (rows, tmp_path / "link", output, errors_path(output)):
        with pytest.raises(RequestError, match="would replace the rows or the results"):
            check_report(page, Source(rows), output)
    with pytest.raises(RequestError, match="its folder does not exist"):
        check_report(tmp_path / "no" / "page.html", Source(rows), output)
