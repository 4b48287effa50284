"""Caravan on a processor without AVX-512, which QEMU emulates, against numpy on the real one.

usage: scripts/prove_old_cpu [PROCESSOR]
  PROCESSOR   Haswell (default): AVX2 and no AVX-512; SandyBridge: no AVX2 either

QEMU's emulator knows no AVX-512 instruction: one that ran would end the process. So what passes
here has run on the kernels of the older processor alone. Three parts, the first two with 1 and with
2 threads:

1. products of 1 to 33 packed rows, in float32 and in bytes, and the engine on a ragged job, against
   numpy in float64 and in whole numbers;
2. the law of company: a sequence's logits are the same bits alone and in any schedule, also where
   a kernel gives a single row other bits, which the one-row probe must find;
3. ``llama-run batch``, whose tokens must be numpy's.

Prints the figures of each, and as the last line all of them as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EMULATORS = ("qemu-x86_64-static", "qemu-x86_64")
MISSING = f"{EMULATORS[0]} is missing: apt-get install qemu-user-static"
HAS_AVX2 = {"Haswell": True, "SandyBridge": False}

# In float32's epsilon of the sum of the terms' absolute values. The largest found is 1.8, on every
# processor; a term left out of the 2,048 of the longest product would make about 4,000.
PRODUCT_TOLERANCE = 4.0
LOGIT_TOLERANCE = 1e-4  # as between graph and decoder: what is left is float32


def emulator() -> str | None:
    """The emulator's path, or None if it is missing."""
    return next(filter(None, map(shutil.which, EMULATORS)), None)


def run_worker(folder: Path, processor: str, threads: int) -> dict[str, Any]:
    """The worker's figures over the cases in a folder."""
    output = _emulated(processor, "tests.old_cpu.worker", folder, threads)
    figures: dict[str, Any] = json.loads(output)
    return figures


def complaints(figures: Mapping[str, Any], processor: str) -> list[str]:
    """What a worker's figures show to be wrong, a sentence each."""
    products, runtime = figures["products"], figures["runtime"]
    company, unpacked = figures["company"], figures["unpacked_company"]
    features, byte_sums = figures["features"], figures["bytes"]
    expectations = {
        f"{processor} shows {features}": (
            "AVX512F" not in features and ("AVX2" in features) is HAS_AVX2[processor]
        ),
        "torch or onnx was imported": figures["torch_free"],
        f"products are off by {products['max_error']:.2f} epsilon (limit {PRODUCT_TOLERANCE})": (
            products["max_error"] <= PRODUCT_TOLERANCE
        ),
        f"{byte_sums['wrong']} of {byte_sums['numbers']} sums of products of bytes are wrong": (
            byte_sums["wrong"] == 0
        ),
        f"{products['other_bits']} products of 2 and more rows have bits that depend on the rest": (
            products["other_bits"] == 0
        ),
        f"logits are off by {runtime['max_logit_difference']:.1e} (limit {LOGIT_TOLERANCE:g})": (
            runtime["max_logit_difference"] <= LOGIT_TOLERANCE
        ),
        f"{runtime['equal_tokens']} of {runtime['tokens']} greedy tokens are numpy's": (
            runtime["equal_tokens"] == runtime["tokens"]
        ),
        f"{company['other_bits']} of {company['rows']} rows have other bits than alone": (
            company["other_bits"] == 0
        ),
        f"{unpacked['other_bits']} of {unpacked['rows']} rows have other bits than alone, where a "
        "kernel treats one row differently": unpacked["other_bits"] == 0,
        "the one-row probe found nothing where there is something": unpacked["row_multiple"] > 1,
        "no slot was ever idle": runtime["steps_with_idle_slots"] > 0,
        "no step had one row alone": company["one_row_steps"] > 0,
    }
    return [sentence for sentence, holds in expectations.items() if not holds]


def run_batch(folder: Path, processor: str) -> list[list[int]]:
    """The tokens that ``llama-run batch`` gives for the prompts of a folder."""
    results = folder / "prompts.results.jsonl"
    options = ("--no-chat", "--force", "--max-tokens", 8, "--temperature", 0, "--threads", 2)
    _emulated(
        processor,
        "llama_runtime",
        *("batch", folder / "prompts.txt", "-o", results, "--bundle", folder / "bundle"),
        *options,
    )
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    return [row["token_ids"] for row in rows]


def _emulated(processor: str, module: str, *arguments: object) -> str:
    """Standard output of a Python module that runs on an emulated processor."""
    path = emulator()
    if path is None:
        raise FileNotFoundError(MISSING)
    # OpenBLAS would take the kernels that this names without asking the processor.
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
    process = subprocess.run(
        [path, "-cpu", processor, sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=1800,
        check=False,
    )
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if "TCG doesn't support" not in line]
        report = "\n".join(lines[-30:])
        raise RuntimeError(f"{module} on {processor} ended with {process.returncode}: {report}")
    return process.stdout


def main() -> None:
    """Build a tiny bundle, run every part, and say what was found."""
    processor = sys.argv[1] if len(sys.argv) == 2 else "Haswell"
    if len(sys.argv) > 2 or processor not in HAS_AVX2:
        print((__doc__ or "").split("\n\n")[1], file=sys.stderr)
        sys.exit(2)
    if emulator() is None:
        sys.exit(MISSING)
    from llama_export.build import build_bundle
    from tests.old_cpu.cases import write_cases
    from tests.tiny_model import write_tiny_model

    figures: dict[str, Any] = {"processor": processor, "workers": [], "complaints": []}
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        model, bundle, folder = (Path(name, part) for part in ("model", "bundle", "cases"))
        model.mkdir()
        folder.mkdir()
        write_tiny_model(model)
        build_bundle(model, bundle)
        write_cases(folder, model, bundle, thorough=True)
        for threads in (1, 2):
            worker = run_worker(folder, processor, threads)
            figures["workers"].append(worker)
            figures["complaints"] += complaints(worker, processor)
            for part in ("products", "runtime", "company", "unpacked_company"):
                print(f"{processor}, threads {threads}, {part}: {worker[part]}", flush=True)
        started = time.monotonic()
        right = json.loads((folder / "completions.json").read_text())
        figures["batch_equal"] = run_batch(folder, processor) == right
        print(f"llama-run batch gives numpy's tokens: {figures['batch_equal']}")
        figures["batch_seconds"] = round(time.monotonic() - started, 1)
    if not figures["batch_equal"]:
        figures["complaints"].append("llama-run batch gives other tokens than numpy")
    print(*figures["complaints"], sep="\n", end="\n" if figures["complaints"] else "")
    print(json.dumps(figures))
    sys.exit(bool(figures["complaints"]))


if __name__ == "__main__":
    main()
