"""Where the figures go: the terminal, and the files that were asked for."""

from __future__ import annotations

from pathlib import Path

from llama_runtime.bench.png import as_png
from llama_runtime.bench.record import Record, as_csv, as_json, write_bytes, write_text
from llama_runtime.bench.report import drawings, render
from llama_runtime.bench.table import as_text
from llama_runtime.command_line import print_out
from llama_runtime.errors import CaravanError


def write(
    record: Record,
    *,
    json_file: Path | None,
    csv_file: Path | None,
    report: Path | None,
    plots: Path | None,
) -> None:
    """Print the table, and write the files.

    Args:
        record: what was measured.
        json_file: for all of it; ``-`` prints it in place of the table.
        csv_file: for a line a run.
        report: for a page of HTML.
        plots: a folder for the charts, made if it isn't there.

    Raises:
        CaravanError: a file can't be written.
    """
    on_screen = str(json_file) == "-"
    print_out(as_json(record) if on_screen else as_text(record))
    if json_file is not None and not on_screen:
        write_text(json_file, as_json(record))
    if csv_file is not None:
        write_text(csv_file, as_csv(record["runs"]))
    if report is not None:
        write_text(report, render(record))
    if plots is not None:
        try:
            plots.mkdir(exist_ok=True)
        except OSError as error:
            raise CaravanError(f"can't make {plots}: {error.strerror}") from error
        for name, text in drawings(record).items():
            path = plots / name
            write_text(path, text)
            picture = as_png(text)
            if picture is not None:
                write_bytes(path.with_suffix(".png"), picture)
