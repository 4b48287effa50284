"""See ``scripts/prove_batch_scale``."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llama_runtime.batch import command
from llama_runtime.batch.rows.source import Source
from llama_runtime.batch.settings import Settings
from llama_runtime.progress import Console
from scripts.bench_machine import machine
from tests.runtime.conftest import use_fakes, write_fake_bundle

LIMIT_MB = 50.0
WARM_SHARE = 0.1  # of the rows; what is held then counts as held from the start
SAMPLE_SECONDS = 5.0
LINE_SECONDS = 30.0


def main() -> None:
    """Run the job, look at memory meanwhile, and say what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--form", choices=("text", "jsonl", "openai"), default="jsonl")
    parser.add_argument("--unordered", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        use_fakes(patch)
        folder = Path(name)
        rows = folder / ("rows.txt" if options.form == "text" else "rows.jsonl")
        _write_rows(rows, options.rows, options.form)
        bundle = write_fake_bundle(folder / "bundle")
        settings = Settings(
            bundle=bundle,
            options={"max_tokens": 1},
            chat=False,
            max_batch=128,
            max_len=64,
            unordered=options.unordered,
        )
        watched = Watched(folder / "results.jsonl", options.rows)
        started = time.perf_counter()
        with watched:
            went_well = command.run(
                Source(rows), folder / "results.jsonl", settings, Console(io.StringIO(), quiet=True)
            )
        seconds = time.perf_counter() - started
        lines = sum(1 for _ in (folder / "results.jsonl").open("rb"))
    grown = watched.grown()
    found: dict[str, Any] = {
        **machine(),
        "rows": options.rows,
        "form": options.form,
        "ordered": not options.unordered,
        "lines": lines,
        "seconds": round(seconds, 1),
        "rows_per_second": round(options.rows / seconds, 1),
        "resident_mb": round(watched.samples[-1][1], 1),
        "grown_mb": round(grown, 1),
        "limit_mb": LIMIT_MB,
    }
    print(json.dumps(found))
    sys.exit(not (went_well and lines == options.rows and grown <= LIMIT_MB))


class Watched:
    """Samples of this process's memory while a job runs.

    Args:
        results: the job's result file, whose length says how far it is.
        rows: how many there are.
    """

    def __init__(self, results: Path, rows: int) -> None:
        self.samples: list[tuple[float, float]] = []  # share of the results' bytes later, MB
        self._results, self._rows = results, rows
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._note()

    def grown(self) -> float:
        """MB between the largest sample after the warm-up and the smallest before it ended."""
        whole = self.samples[-1][0]
        late = [memory for size, memory in self.samples if size >= WARM_SHARE * whole]
        return max(late) - late[0]

    def _watch(self) -> None:
        said = time.monotonic()
        while not self._ended.wait(SAMPLE_SECONDS):
            self._note()
            if time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                size, memory = self.samples[-1]
                print(f"{size / 1e6:,.0f} MB of results, {memory:,.1f} MB resident", flush=True)

    def _note(self) -> None:
        size = self._results.stat().st_size if self._results.exists() else 0
        self.samples.append((size, _resident_mb()))


def _resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError("the kernel doesn't say what is resident")


def _write_rows(path: Path, count: int, form: str) -> None:
    with path.open("w") as file:
        for index in range(count):
            prompt = f"{index % 100:02}"
            if form == "text":
                file.write(f"{prompt}\n")
            elif form == "jsonl":
                file.write(f'{{"id": {index}, "prompt": "{prompt}"}}\n')
            else:
                body = {"model": "fake-llama", "prompt": prompt}
                row = {"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions"}
                file.write(json.dumps({**row, "body": body}) + "\n")


if __name__ == "__main__":
    main()
