"""The figures of scripts/bench_limits, which prepares what this needs.

    decode   steps of 1 and of 32 sequences: bytes read and operations of products a second, over
             what the machine was seen to reach in the same round
    memory   the most that a process holds which fills 8 slots of 2,048 tokens with the int4
             bundle, over its weight file and the cells of the slots

Limits and steps are measured in the same rounds, in turns, and a share is the median of the rounds'
shares. A step reads what products and norms read of the weight file, and the cache of its
sequences; whatever else it reads or multiplies is not counted, and lowers the share.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from llama_runtime.machine import default_threads
from scripts.bench_limits_machine import (
    VNNI_TO_FLOAT,
    float_product,
    multipliers,
    readers,
)
from scripts.bench_limits_steps import Decoders, Round
from scripts.bench_machine import machine

SHAPE = "Llama-3.2-1B"
NAMES = ("int4", "int8")
CASES = (("int4", 1), ("int8", 1), ("int8", 32), ("int4", 32))
ASKED = {"int4 1": "bandwidth", "int8 32": "byte_rate"}  # which share is asked of a case
ASKED_SHARE, ASKED_MEMORY = 0.6, 1.2
PARTS = ("graph", "step", "fastest")  # of a round's times
SETTLE_SECONDS = 0.1  # threads of what ran before spin a little while

Results = dict[str, Any]


def main() -> None:
    """Run the figures that were asked for; the last line is JSON."""
    parser = argparse.ArgumentParser(description="Measure shares of this machine's limits.")
    parser.add_argument("--bundle", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", action="append", choices=["decode", "memory"], default=[])
    parser.add_argument("--rounds", type=int, default=5, help="at least 1 (default: 5)")
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    given = _bundles(parser, options.bundle)
    chosen = options.only or ["decode", "memory"]
    needed = NAMES if "decode" in chosen else ("int4",)
    paths = {name: given.get(name) or _built(name) for name in needed}
    results: Results = {**machine(), "threads": options.threads, "rounds": options.rounds}
    if "decode" in chosen:
        results["decode"] = decode(paths, options.threads, options.rounds)
    if "memory" in chosen:
        results["memory"] = memory(paths["int4"], options.threads)
    print(json.dumps(results))


def decode(paths: dict[str, Path], threads: int, rounds: int) -> Results:
    """The machine's limits and decode steps, in turns.

    Args:
        paths: the bundles, by precision.
        threads: of everything.
        rounds: how many count.

    Returns:
        "limits", and what ``shares`` returns for each case.
    """
    batches = {name: [batch for other, batch in CASES if other == name] for name in NAMES}
    decoders = {name: Decoders(paths[name], threads, batches[name]) for name in NAMES}
    ways = {
        "bandwidth": readers(threads),
        "byte_rate": multipliers(threads),
        "float_rate": {"MatMul": float_product(threads)},
    }
    works: dict[tuple[str, str], Callable[[], float | Round]] = {
        ("case", f"{name} {batch}"): partial(decoders[name].round, batch) for name, batch in CASES
    }
    for kind, several in ways.items():
        works |= {(kind, name): way for name, way in several.items()}
    seen: dict[tuple[str, str], list[Any]] = {key: [] for key in works}
    for number in range(-1, rounds):  # the first packs weights and touches memory
        for key in sorted(works, reverse=number % 2 == 1):  # who is first alternates
            time.sleep(SETTLE_SECONDS)
            result = works[key]()
            if number >= 0:
                seen[key].append(result)
        print(f"round {number + 1} of {rounds} is done", file=sys.stderr, flush=True)
    for one in decoders.values():
        one.close()
    limits = {
        kind: limit({name: seen[kind, name] for name in several}) for kind, several in ways.items()
    }
    say_limits(limits)
    results: Results = {"limits": limits}
    for name, batch in CASES:
        case = f"{name} {batch}"
        results[case] = shares(seen["case", case], limits, batch)
        say_shares(case, results[case])
    return results


def limit(ways: dict[str, list[float]]) -> Results:
    """The best of several ways by its median, and the rounds of all.

    Args:
        ways: what each round gave, by way.
    """
    best = max(ways, key=lambda name: median(ways[name]))
    return {"best": best, "per_s": median(ways[best]), "rounds": ways}


def shares(rounds: list[Round], limits: Results, batch: int) -> Results:
    """What decode steps reach of the limits that the same rounds saw.

    Args:
        rounds: of one case.
        limits: what ``limit`` returned of "bandwidth" and "byte_rate".
        batch: sequences that decode at once.

    Returns:
        Medians of bytes and operations of a step, and tokens a second; by "graph", "step" and
        "fastest" (the fastest step's graph) milliseconds and the shares of the two limits, with
        those of the worst and the best round.
    """
    result: Results = {
        "tokens_per_s": batch / median(one.step_s for one in rounds),
        "bytes": median(one.num_bytes for one in rounds),
        "operations": rounds[0].operations,
    }
    for part in PARTS:
        times = [getattr(one, f"{part}_s") for one in rounds]
        result[part] = {"ms": 1e3 * median(times)}
        for kind, amount in (("bandwidth", "num_bytes"), ("byte_rate", "operations")):
            most = limits[kind]["rounds"][limits[kind]["best"]]
            found = sorted(
                getattr(one, amount) / taken / at_most
                for one, taken, at_most in zip(rounds, times, most, strict=True)
            )
            result[part] |= {
                kind: median(found),
                f"{kind}_low": found[0],
                f"{kind}_high": found[-1],
            }
    return result


def say_limits(limits: Results) -> None:
    """Print what the machine reached, and by what way."""
    bandwidth, byte_rate = limits["bandwidth"], limits["byte_rate"]
    float_rate = limits["float_rate"]["per_s"]
    print(
        f"reading memory: {bandwidth['per_s'] / 1e9:.1f} GB/s ({bandwidth['best']})\n"
        f"multiplying bytes: {byte_rate['per_s'] / 1e12:.2f} TOP/s (MatMulInteger "
        f"{byte_rate['best']}); products of float32 reach {float_rate / 1e12:.3f}, and where one "
        f"VNNI instruction does {VNNI_TO_FLOAT} times the work of one for floats, bytes could "
        f"reach {VNNI_TO_FLOAT * float_rate / 1e12:.2f} at least",
        flush=True,
    )


def say_shares(case: str, result: Results) -> None:
    """Print a case."""
    name, batch = case.split()
    line = f"{name}, {batch:>2} at once: {result['tokens_per_s']:6.1f} tokens/s"
    for part in PARTS:
        one = result[part]
        line += (
            f"; {part} {one['ms']:6.1f} ms, {one['bandwidth']:.0%} of reading "
            f"({one['bandwidth_low']:.0%} to {one['bandwidth_high']:.0%}), "
            f"{one['byte_rate']:.0%} of multiplying "
            f"({one['byte_rate_low']:.0%} to {one['byte_rate_high']:.0%})"
        )
    if case in ASKED:
        of = "reading" if ASKED[case] == "bandwidth" else "multiplying"
        line += f"; asked {ASKED_SHARE:.0%} of {of}"
    print(line, flush=True)


def memory(path: Path, threads: int) -> Results:
    """Fill a bundle's slots in a process of its own."""
    command = [sys.executable, "-m", "scripts.bench_limits_memory", os.fspath(path)]
    done = subprocess.run(
        [*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: Results = json.loads(done.stdout.splitlines()[-1])
    megabytes = {name: f"{result[name] / 1e6:,.0f} MB" for name in ("weights", "cache", "peak")}
    print(
        f"{result['slots']} slots x {result['max_len']:,} tokens, full: {megabytes['peak']} at "
        f"most, {result['ratio']:.2f}x the weights ({megabytes['weights']}) and the cache "
        f"({megabytes['cache']}), asked {ASKED_MEMORY}x; without pages of files "
        f"{result['filled']['own'] / 1e6:,.0f} MB, {result['own_ratio']:.2f}x; while loading "
        f"{result['peak_loading'] / 1e6:,.0f} MB at most",
        flush=True,
    )
    return result | {"asked_ratio": ASKED_MEMORY}


def _bundles(parser: argparse.ArgumentParser, pairs: list[str]) -> dict[str, Path]:
    found = {}
    for name, _, path in (pair.partition("=") for pair in pairs):
        if name not in NAMES or not path:
            parser.error(f"{name!r:.80} is no NAME=PATH whose name is {' or '.join(NAMES)}")
        if not (Path(path) / "manifest.json").is_file():
            parser.error(f"{path} is no bundle: build one with llama-export build")
        found[name] = Path(path)
    return found


def _built(name: str) -> Path:
    """Our bundle of the shape, where scripts/bench_peers keeps it, built unless it is there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    output = cache / "caravan-peers" / "models" / SHAPE / f"caravan-{name}"
    if not output.exists():
        build = [sys.executable, "-m", "llama_export", "build", SHAPE, "--weights", "random:0"]
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [*build, "--quiet", "--precision", name, "--output", output],
            stdout=sys.stderr,
            check=True,
        )
    return output


if __name__ == "__main__":
    main()
