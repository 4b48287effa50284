"""See ``scripts/bench_batch_job``."""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from llama_runtime.batch.forms.formats import Record, Task
from llama_runtime.batch.forms.recipe import Recipe
from llama_runtime.batch.job import Job
from llama_runtime.batch.preparation import prepared
from llama_runtime.batch.rows.source import Source
from llama_runtime.batch.runners.runner import LocalRunner
from llama_runtime.batch.settings import Settings
from llama_runtime.bundle import open_bundle
from llama_runtime.errors import RequestError
from llama_runtime.llm import LLM
from llama_runtime.machine import default_threads
from llama_runtime.progress import Console
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.shared_engine import Inbox
from scripts.bench_clock import seconds
from scripts.bench_machine import ROOT, machine
from scripts.fetch_model import OUTPUT as SMOLLM2

BUNDLE = ROOT / "artifacts/bench/int8-uncalibrated"
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have"
MAX_BATCH, MAX_LEN = 32, 512
ASKED = 3


def main() -> None:
    """Both in turns, and the median of the ratios."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    options = parser.parse_args()
    build(options.bundle)
    rows = _rows(options.rows)
    by_length = sorted(rows, key=lambda row: len(row["prompt"]) + 5 * row["max_tokens"])
    ratios, sorted_ratios, shares, found = [], [], [], []
    encoder = PromptEncoder(open_bundle(options.bundle))
    # Without kept prefixes: the rows of one run would spare the next some work, by their order.
    with LLM(
        encoder,
        max_batch=MAX_BATCH,
        max_len=MAX_LEN,
        prefix_tokens=0,
        threads=options.threads,
    ) as llm:
        llm.warm_up()
        steps = _Steps(llm)
        for number in range(options.rounds + 1):  # the first one warms up
            start = steps.number
            plain, plain_own = steps.beside(lambda: _generate(llm, rows))
            middle = steps.number
            job, job_own = steps.beside(lambda: _run_job(llm, encoder, rows))
            plain_steps, job_steps = middle - start, steps.number - middle
            in_order = seconds(lambda: _run_job(llm, encoder, by_length))
            if number:
                ratios.append(job / plain)
                shares.append((job_own - plain_own) / plain)
                sorted_ratios.append(in_order / job)
                found.append((plain, plain_own, plain_steps, job, job_own, job_steps, in_order))
                print(
                    f"LLM.generate {plain:6.2f} s, {plain_own:.3f} of them beside its "
                    f"{plain_steps} steps; the job {job:6.2f} s, {job_own:.3f} of them beside its "
                    f"{job_steps}; {job / plain:.3f} times, and "
                    f"{100 * shares[-1]:+.2f} % beside the steps; by length {in_order:6.2f} s"
                )
    ratio = median(ratios)
    print(f"rows that are sorted by length take {median(sorted_ratios):.3f} times as long as mixed")
    print(f"a job takes {ratio:.3f} times as long, which is as exact as the machine is quiet")
    percent = 100 * median(shares)
    print(f"it does {percent:+.2f} % more beside the steps (asked for: {ASKED} % at most)")
    figures: dict[str, Any] = {
        **machine(),
        "rows": options.rows,
        "threads": options.threads,
        "ratio": ratio,
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "seconds": found,
        "sorted_ratio": median(sorted_ratios),
        "beside_steps_percent": percent,
        "asked_percent": ASKED,
    }
    print(json.dumps(figures))


def build(bundle: Path) -> None:
    """Build the real model in int8 where there is no bundle yet."""
    if bundle.exists():
        return
    command = [sys.executable, "-m", "llama_export", "build", str(SMOLLM2), "--precision", "int8"]
    command += ["--no-calibration", "--no-quality", "--output", str(bundle), "--quiet"]
    subprocess.run(command, check=True)


class _Steps:
    """Tells time in the model's steps, which differs from run to run, from what is done beside it.

    Steps are those of ``LLM.run``, which both ways go through: scheduler, graph, sampler and text.
    """

    def __init__(self, llm: LLM) -> None:
        self._inside = 0.0
        engine = llm._engine
        wait = engine.wait

        def timed(inbox: Inbox) -> None:
            began = time.perf_counter()
            wait(inbox)
            self._inside += time.perf_counter() - began

        engine.wait = timed  # type: ignore[method-assign]
        self.number = 0
        step = engine._step

        def counted() -> None:
            self.number += 1
            step()

        engine._step = counted  # type: ignore[method-assign]

    def beside(self, work: Callable[[], float]) -> tuple[float, float]:
        """Seconds of a call, and how many of them were no steps.

        Args:
            work: returns the processor time of what it did in another thread while the model
                worked; it is added, as if nothing had run meanwhile.
        """
        self._inside = 0.0
        began = time.perf_counter()
        elsewhere = work()
        whole = time.perf_counter() - began
        return whole, whole - self._inside + elsewhere


class _TimedRunner(LocalRunner):
    """Knows the processor time of the thread in which rows are read and become tokens."""

    ahead_seconds = 0.0

    def _prepared(self, record: Record) -> tuple[Record, Task | RequestError]:
        found = super()._prepared(record)
        self.ahead_seconds = time.thread_time()
        return found


def _rows(count: int) -> list[dict[str, Any]]:
    """Prompts of 16 to 256 words that share no beginning, 16 to 128 tokens out."""
    numbers = random.Random(0)
    words = WORDS.split()
    return [
        {
            "prompt": " ".join(
                [f"Row {index}:", *numbers.choices(words, k=numbers.randint(16, 256))]
            ),
            "max_tokens": numbers.randint(16, 128),
        }
        for index in range(count)
    ]


def _generate(llm: LLM, rows: list[dict[str, Any]]) -> float:
    params = [
        replace(llm.default_params, temperature=0.0, max_tokens=row["max_tokens"], ignore_eos=True)
        for row in rows
    ]
    llm.generate([row["prompt"] for row in rows], params)
    return 0.0  # nothing is done ahead


def _run_job(llm: LLM, encoder: PromptEncoder, rows: list[dict[str, Any]]) -> float:
    """What ``llama-run batch`` does, but for loading the model and its text side."""
    sampling = {"temperature": 0.0, "ignore_eos": True}
    settings = Settings(bundle=llm.bundle.path, options=sampling, chat=False)
    console = Console(io.StringIO(), quiet=True)
    with tempfile.TemporaryDirectory() as name:
        source = Source(Path(name, "rows.jsonl"))
        assert source.path is not None
        source.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = Recipe.of_job(encoder, llm.default_params, sampling, chat=False)
        output = Path(name, "results.jsonl")
        with prepared(source, output, recipe, settings, console, lambda _: None) as work:
            work.ledger.window = 8 * llm.max_batch
            job = Job(work.ledger, work.statistics, work.folder, lambda: llm.stats().running)
            with work.records() as records:
                runner = _TimedRunner(llm, work.form)
                job.run(runner, records)
        if work.statistics.rows != len(rows) or work.statistics.failed:
            raise RuntimeError(f"{work.statistics.failed} rows failed")
        return runner.ahead_seconds


if __name__ == "__main__":
    main()
