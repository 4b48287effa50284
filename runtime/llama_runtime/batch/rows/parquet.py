"""Parquet files as the lines that a JSONL file with the same rows would have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_runtime.batch.rows.lines import MAX_LINE_BYTES, Line
from llama_runtime.errors import DependencyError, RequestError

PARQUET_MAGIC = b"PAR1"
_BATCH_ROWS = 1024  # decoded at once


def parquet_lines(path: Path) -> Iterator[Line]:
    """The rows of a file, each as a JSON object with its columns as keys.

    Args:
        path: a parquet file.

    Raises:
        DependencyError: pyarrow isn't installed.
        RequestError: the file is damaged.
    """
    try:
        import pyarrow  # type: ignore[import-not-found,import-untyped,unused-ignore]
        import pyarrow.parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise DependencyError(
            f"{path} is a parquet file, which pyarrow reads: pip install 'llama-caravan[scale]'"
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                for row in _rows(batch):
                    number += 1
                    yield _line(number, row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise RequestError(
            f"{path} can't be read beyond row {number}: {reason}", param="file"
        ) from error


def _rows(batch: Any) -> Iterator[dict[str, Any] | ValueError]:
    """The rows of a batch; an error in the place of one that has no value in Python."""
    try:
        yield from batch.to_pylist()
    except ValueError:  # bytes that are no UTF-8, say: its neighbours are whole
        for at in range(len(batch)):
            try:
                yield from batch.slice(at, 1).to_pylist()
            except ValueError as error:
                yield error


def _line(number: int, row: dict[str, Any] | ValueError) -> Line:
    if isinstance(row, ValueError):
        return Line(number, "", f"row {number} can't be read: {row}")
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # a column of bytes, dates or decimals
        return Line(number, "", f"row {number} can't be written as JSON: {error}")
    if len(text) > MAX_LINE_BYTES:
        return Line(number, "", f"row {number} is longer than {MAX_LINE_BYTES} bytes")
    return Line(number, text)
