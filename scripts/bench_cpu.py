"""The figures of scripts/bench_cpu, which prepares what this needs.

usage: python -m scripts.bench_cpu BUNDLE [--peer MODEL] [--only FIGURE]...
                                  [--rounds N] [--threads N]

    decode   tokens per second at 1, 8 and 32 sequences, alternating with ONNX Runtime GenAI
    around   what a step costs beside the graph, 32 greedy rows, `Fake` backend
    mixed    256 requests of mixed length: continuous batching, fixed batches, padded batches
    start    `import llama_runtime` and `llama-run --help`, whole processes

Everything that is compared runs in the same rounds, in turns; a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from llama_runtime.machine import default_threads
from scripts.bench_batching import around, mixed
from scripts.bench_clock import seconds
from scripts.bench_decode import decode
from scripts.bench_machine import machine

Results = dict[str, Any]


def start(rounds: int) -> Results:
    """Whole processes, the interpreter's own start included."""
    python = sys.executable
    commands = {
        "import": ([python, "-c", "import llama_runtime"], 0.25),
        "help": ([os.fspath(Path(python).with_name("llama-run")), "--help"], 0.4),
    }
    result: Results = {}
    for name, (command, target) in commands.items():

        def once(command: list[str] = command) -> None:
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

        once()
        result[f"{name}_s"] = median(seconds(once) for _ in range(2 * rounds + 1))
        result[f"{name}_asked_s"] = target
    print(
        f"import llama_runtime {result['import_s']:.2f} s (asked 0.25 s), "
        f"llama-run --help {result['help_s']:.2f} s (asked 0.4 s)"
    )
    return result


def main() -> None:
    """Run the figures that were asked for; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Measure Caravan on this machine's CPU.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--peer", type=Path, help="a model of ONNX Runtime GenAI to compare with")
    parser.add_argument(
        "--only", action="append", choices=["decode", "around", "mixed", "start"], default=[]
    )
    parser.add_argument("--rounds", type=int, default=5, help="at least 1 (default: 5)")
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    results: Results = {
        **machine(),
        "threads": options.threads,
        "rounds": options.rounds,
    }
    chosen = options.only or ["start", "around", "decode", "mixed"]
    if "start" in chosen:
        results["start"] = start(options.rounds)
    if "around" in chosen:
        results["around"] = around(options.bundle, options.rounds)
    if "decode" in chosen:
        results["decode"] = decode(options.bundle, options.peer, options.threads, options.rounds)
    if "mixed" in chosen:
        results["mixed"] = mixed(options.bundle, options.threads, options.rounds)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
