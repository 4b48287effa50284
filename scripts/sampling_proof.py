"""The compiled sampler beside its specification in numpy, and beside other people's formulas.

1. For each vocabulary, rows of every shape with every mix of parameters: the compiled sampler takes
   the reference's token, or one whose border is no further than 1e-6 from the number drawn.
2. For each processor alone and in mixes, draws with seeds of their own: their frequencies pass a
   chi-square test against the distribution of transformers' processors.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from llama_runtime.sampling import Kernels, Reference
from tests.sampling.frequencies import (
    CASES,
    FALSE_ALARM,
    VOCAB_SIZE,
    a_row,
    chi_square,
    counts_of_draws,
    distribution,
)
from tests.sampling.rows import Agreement, compare, compiled, job, random_kinds

VOCAB_SIZES = (32_000, 49_152, 128_256, 50_021)  # Llama 2, SmolLM2, Llama 3, and a prime number
ROWS_AT_ONCE = 40
# The share of rows whose token may lie beside the right one: where logits are equal, a nucleus may
# end just between two of them.
MOST_NEAR = 0.01


def compare_rows(vocab_size: int, rows: int) -> Agreement:
    """The compiled sampler beside the reference on random rows."""
    rng = np.random.default_rng(vocab_size)
    found = Agreement(0, 0, 0, [])
    while found.rows < rows:
        count = min(ROWS_AT_ONCE, rows - found.rows)
        part = compare(compiled(vocab_size), job(rng, vocab_size, random_kinds(rng, count)))
        found.rows += part.rows
        found.equal += part.equal
        found.near += part.near
        found.wrong += part.wrong
    return found


def main() -> None:
    """Compare, count, and say what was found."""
    parser = argparse.ArgumentParser(prog="scripts/prove_sampling", description=__doc__)
    parser.add_argument("rows", nargs="?", type=int, default=10_000)
    parser.add_argument("draws", nargs="?", type=int, default=20_000)
    given = parser.parse_args()
    started = time.monotonic()
    figures: dict[str, Any] = {"rows": [], "frequencies": [], "complaints": []}
    print(f"{'vocabulary':>10}  {'rows':>6}  {'equal':>6}  {'beside':>6}  {'wrong':>6}")
    for vocab_size in VOCAB_SIZES:
        found = compare_rows(vocab_size, given.rows)
        wrong = len(found.wrong)
        print(
            f"{vocab_size:>10,}  {found.rows:>6}  {found.equal:>6}  {found.near:>6}  {wrong:>6}",
            flush=True,
        )
        figures["rows"].append(
            {"vocab_size": vocab_size, "rows": found.rows, "equal": found.equal, "wrong": wrong}
        )
        figures["complaints"] += [f"V {vocab_size}: {sentence}" for sentence in found.wrong[:5]]
        if found.near > MOST_NEAR * found.rows:
            figures["complaints"].append(f"V {vocab_size}: {found.near} tokens beside the right")
    print(f"\n{'processors':>12}  {'sampler':>9}  {'chi-square':>10}  {'limit':>6}  degrees")
    samplers: dict[str, Kernels] = {"compiled": compiled(VOCAB_SIZE), "numpy": Reference()}
    for number, (name, params) in enumerate(CASES.items()):
        row = a_row(number)
        expected = distribution(row, params)
        for sampler, kernels in samplers.items():
            test = chi_square(counts_of_draws(kernels, row, params, given.draws), expected)
            print(
                f"{name:>12}  {sampler:>9}  {test.statistic:>10.1f}  {test.limit:>6.1f}  "
                f"{test.degrees}",
                flush=True,
            )
            figures["frequencies"].append(
                {"case": name, "sampler": sampler, "statistic": round(test.statistic, 1)}
            )
            if not test.holds:
                figures["complaints"].append(f"{name}, {sampler}: {test}")
    figures |= {"draws": given.draws, "false_alarm": FALSE_ALARM}
    figures["seconds"] = round(time.monotonic() - started, 1)
    print(*figures["complaints"], sep="\n", end="\n" if figures["complaints"] else "")
    print(json.dumps(figures))
    sys.exit(bool(figures["complaints"]))


if __name__ == "__main__":
    main()
