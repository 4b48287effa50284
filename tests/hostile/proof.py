"""Proof that files made to do harm do none; scripts/prove_hostile_files runs it.

Checkpoints are opened and read whole, weights and tokenizer included, each in a fork of one process
that has imported torch. Bundles are given to ``llama-run``, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.hostile.bundles import HOSTILE
from tests.hostile.checkpoints import mutate, write_sources
from tests.hostile.measured import measured

LIMIT_S = 2.0
LIMIT_BYTES = 200 * 10**6
KILLED_AFTER_S = 10


def main() -> None:
    """Parse arguments, run, print figures and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/prove_hostile_files")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant (default 0)")
    parser.add_argument("--count", type=int, default=600, help="mutated checkpoints (default 600)")
    parser.add_argument("--no-bundles", action="store_true", help="leave out the bundles")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bad, figures = prove_checkpoints(folder, args.seed, args.count)
        if not args.no_bundles:
            bad_bundles, more = prove_bundles(folder)
            bad, figures = bad + bad_bundles, figures | more
    for line in bad:
        print(line)
    print(json.dumps({"passed": not bad, "seed": args.seed, **figures}))
    sys.exit(bool(bad))


def prove_checkpoints(folder: Path, seed: int, count: int) -> tuple[list[str], dict[str, object]]:
    """Read mutants of seeds from ``seed`` on; what went wrong, and figures."""
    import llama_export.build  # noqa: F401 - imported once, before the forks

    sources = write_sources(folder)
    for source in sources:
        said, _, _ = in_fork(partial(read_whole, source))
        if said != "loaded":
            return [f"the good checkpoint {source.name}: {said}"], {}
    bad: list[str] = []
    outcomes: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    for number in range(seed, seed + count):
        place = folder / "mutant"
        place.mkdir()
        mutant, what = mutate(sources[number % len(sources)], place, number)
        said, seconds, grown = in_fork(partial(read_whole, mutant))
        shutil.rmtree(place)
        outcomes["loaded" if said == "loaded" else "refused"] += 1
        slowest, largest = max(slowest, seconds), max(largest, grown)
        if not said.startswith(("loaded", "refused: ")) or "\n" in said:
            bad.append(f"seed {number}, {what}: {said}")
        elif seconds > LIMIT_S or grown > LIMIT_BYTES:
            bad.append(f"seed {number}, {what}: {seconds:.1f} s, {grown / 1e6:.0f} MB; {said}")
    return bad, {
        "mutants": count,
        **outcomes,
        "slowest_s": round(slowest, 2),
        "most_mb": round(largest / 1e6),
    }


def read_whole(path: Path) -> str:
    """What a build reads, down to the last weight: "loaded", or "refused: " and why."""
    from llama_decoder.checkpoint import open_checkpoint
    from llama_decoder.weights import parameter_shapes
    from llama_export.sources import read_tokenizer
    from llama_export.weight_file import float32_layout, write_weights
    from llama_runtime.errors import CaravanError

    try:
        checkpoint = open_checkpoint(path)
        read_tokenizer(checkpoint)
        checkpoint.licence_files()
        layout = float32_layout(parameter_shapes(checkpoint.config))
        for _ in write_weights(Path(os.devnull), layout, checkpoint.weights()):
            pass
        checkpoint.sha256()
    except CaravanError as error:
        return f"refused: {error}"
    return "loaded"


def in_fork(work: Callable[[], str]) -> tuple[str, float, int]:
    """Run something in a fork: what it returned, seconds, and bytes that its memory grew by."""
    reading, writing = os.pipe()
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        os.close(reading)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of Rust
        signal.alarm(KILLED_AFTER_S)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            said = work()
        except BaseException:
            said = f"untyped error: {traceback.format_exc().splitlines()[-1]} ({_place()})"
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        os.write(writing, f"{grown} {said[:2000]}".encode(errors="replace"))
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(process, 0)
    seconds = time.monotonic() - start
    if status or not answer:
        return f"ended with status {os.waitstatus_to_exitcode(status)}", seconds, 0
    size, said = answer.split(" ", 1)
    return said, seconds, int(size)


def _place() -> str:
    """Where the current exception was raised, of our own code."""
    frames = [
        frame
        for frame in traceback.extract_tb(sys.exc_info()[2])
        if "llama_" in frame.name + frame.filename
    ]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def prove_bundles(folder: Path) -> tuple[list[str], dict[str, object]]:
    """Give every hostile bundle to ``llama-run``; what went wrong, and figures."""
    from llama_export.build import build_bundle

    build_bundle(folder / "single", folder / "bundle")
    bad: list[str] = []
    slowest, largest = 0.0, 0
    for name in HOSTILE:
        problem, seconds, peak = give_to_llama_run(folder / "bundle", name, folder / "hostile")
        slowest, largest = max(slowest, seconds), max(largest, peak)
        if problem:
            bad.append(f"bundle, {name}: {problem}")
    return bad, {
        "bundles": len(HOSTILE),
        "bundles_slowest_s": round(slowest, 2),
        "bundles_most_mb": round(largest / 1e6),
    }


def give_to_llama_run(good: Path, name: str, place: Path) -> tuple[str, float, int]:
    """Make one hostile bundle and run one prompt on it.

    Args:
        good: the bundle to start from.
        name: of the change.
        place: a folder that isn't there yet, and isn't afterwards.

    Returns:
        What went wrong, empty if nothing did; seconds; the most bytes of memory.
    """
    bundle = place / "bundle"
    shutil.copytree(good, bundle)
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
    options = ["--max-tokens", "4", "--bundle", str(bundle)]
    try:
        HOSTILE[name](bundle)
        run = measured(
            [sys.executable, "-m", "llama_runtime", "generate", "hello", *options], env=environment
        )
    finally:
        shutil.rmtree(place)
    problem = ""
    if run.status not in (1, 2) or not run.said.startswith("Error: ") or run.said.count("\n") != 1:
        problem = f"status {run.status}, {run.said[-500:]!r}"
    elif run.seconds > LIMIT_S or run.peak_bytes > LIMIT_BYTES:
        problem = f"{run.seconds:.2f} s, {run.peak_bytes / 1e6:.0f} MB, {run.said!r}"
    return problem, run.seconds, run.peak_bytes


if __name__ == "__main__":
    main()
