"""Where the results of a job go, checked as far as it can be without touching anything."""

from __future__ import annotations

import os
from pathlib import Path

from llama_runtime.batch.job_folder import JobFolder, errors_path
from llama_runtime.batch.rows.source import Source, bare
from llama_runtime.errors import RequestError

STANDARD_OUTPUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def destination(source: Source, output: str | None) -> Path | None:
    """The result file of a job.

    Args:
        source: where the rows come from.
        output: a file name, ``-`` or another name of standard output, or None for the default:
            beside a file of rows, and standard output for a stream.

    Returns:
        The file, or None for standard output.

    Raises:
        RequestError: the file can't be written, or is that of the rows.
    """
    if output in STANDARD_OUTPUT or (output is None and source.is_stream):
        return None
    if output is not None:
        path = Path(output)
    else:
        path = bare(source.path or Path()).with_suffix(".results.jsonl")
    try:
        _check(path, source)
    except OSError as error:
        raise _refuse(f"the output {path} can't be written: {error.strerror}") from error
    return path


def check_report(report: Path, source: Source, output: Path | None) -> None:
    """Refuse a page that can't be written, or would replace rows or results.

    Args:
        report: where the page goes.
        source: where the rows come from.
        output: from ``destination``.

    Raises:
        RequestError: it is refused.
    """
    others = [] if source.path is None else [source.path]
    if output is not None:
        others += [output, errors_path(output)]
    resolved = report.resolve()
    if any(resolved == other.resolve() for other in others):
        raise RequestError(
            f"the page {report} would replace the rows or the results: give --report another file",
            param="report",
        )
    if not report.parent.is_dir():
        raise RequestError(
            f"the page {report} can't be written: its folder does not exist", param="report"
        )
    if not os.access(report if report.exists() else report.parent, os.W_OK):
        raise RequestError(f"the page {report} can't be written: permission denied", param="report")


def can_resume(path: Path | None) -> bool:
    """Whether a job that writes there can go on after an interruption: devices keep nothing."""
    return path is not None and (path.is_file() or not path.exists())


def check_unused(path: Path) -> None:
    """Refuse a file that is there already and isn't that of a job.

    Raises:
        RequestError: it is there.
    """
    if path.is_file():
        raise _refuse(
            f"the output {path} exists, and is not that of a job which could go on: give --force "
            "to replace it, or --output to write elsewhere"
        )


def _check(path: Path, source: Source) -> None:
    if path.is_dir():
        raise _refuse(f"the output {path} is a directory")
    if not path.parent.is_dir():
        raise _refuse(f"the output {path} can't be written: its folder does not exist")
    written = [path]
    if can_resume(path):
        written += [errors_path(path), JobFolder(path).input]
    for file in written:
        if source.path is not None and file.exists() and file.samefile(source.path):
            raise _refuse(f"the output {path} would replace the prompts file {source}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _refuse(f"the output {path} can't be written: permission denied")


def _refuse(message: str) -> RequestError:
    return RequestError(message, param="output")
