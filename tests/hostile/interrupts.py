"""Proof that an interrupt at any moment loses nothing; scripts/prove_interrupts runs it.

``llama-run batch`` and ``llama-export build`` are started over and over, and each gets SIGINT,
SIGTERM or SIGKILL after a random time, from the moment on at which it has taken charge of signals:
while it imports, parses, loads, works and ends. Before that, Python itself answers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.tiny_model import build_tiny_bundle

NUM_ROWS = 200
SIGNALS = (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
LIMIT_S = 60.0

Check = Callable[[int, str, signal.Signals], str]


def main() -> None:
    """Parse arguments, run, print figures and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/prove_interrupts")
    parser.add_argument("--seed", type=int, default=0, help="of the random times (default 0)")
    parser.add_argument("--batches", type=int, default=150, help="interrupted batches (150)")
    parser.add_argument("--builds", type=int, default=40, help="interrupted builds (40)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = build_tiny_bundle(folder)
        bad, outcomes = interrupt_batches(folder, bundle, args.batches, rng)
        bad_builds, more = interrupt_builds(
            folder, bundle, args.builds, rng, model=folder / "model"
        )
    for line in bad + bad_builds:
        print(line)
    figures = {"batches": args.batches, **outcomes, "builds": args.builds, **more}
    print(json.dumps({"passed": not bad + bad_builds, "seed": args.seed, **figures}))
    sys.exit(bool(bad + bad_builds))


def interrupt_batches(
    folder: Path, bundle: Path, count: int, rng: random.Random
) -> tuple[list[str], dict[str, int]]:
    """Interrupt as many batches; what went wrong, and how they ended."""
    prompts, output = folder / "prompts.txt", folder / "out.jsonl"
    prompts.write_text("".join(f"row {i} {'x' * (i * 7 % 50)}\n" for i in range(NUM_ROWS)))
    command = [
        *("llama_runtime", "batch", str(prompts), "-o", str(output), "--bundle", str(bundle)),
        *("--max-tokens", "60", "--max-batch", "4", "--threads", "1", "--seed", "0"),
    ]
    whole, seconds = _whole_run(command, output)

    def check(status: int, said: str, sent: signal.Signals) -> str:
        lines = output.read_bytes() if output.exists() else b""
        output.unlink(missing_ok=True)
        shutil.rmtree(f"{output}.job", ignore_errors=True)  # each run begins anew
        num_lines = lines.count(b"\n")
        if not whole.startswith(lines) or (lines and not lines.endswith(b"\n")):
            return f"what is written is not whole: ...{lines[-80:]!r}"
        if sent is signal.SIGKILL:
            return ""
        if status in (0, -sent):  # while the interpreter ends, it takes no signal itself
            return "" if lines == whole else "the job ended well and is not whole"
        last = said.splitlines()[-1] if said else ""
        expected = (
            f"stopped: the results of {num_lines} of {NUM_ROWS} rows are in {output}; the same "
            "command goes on"
        )
        if last != expected and not (last == "interrupted" and not lines):
            return f"{num_lines} lines are written, and the last line said is {last!r}"
        return ""

    return _interrupt(command, seconds, count, rng, check)


def interrupt_builds(
    folder: Path,
    bundle: Path,
    count: int,
    rng: random.Random,
    *,
    model: Path,
    seconds: float | None = None,
) -> tuple[list[str], dict[str, int]]:
    """Interrupt as many builds, each over a bundle that is there or where there is none.

    Args:
        folder: for what is built.
        bundle: what is there before every other build.
        count: how many builds.
        rng: says when and how.
        model: what is built from.
        seconds: that a whole build takes; None measures it.
    """
    place = folder / "builds"
    output = place / "bundle"
    place.mkdir()
    command = ["llama_export", "build", str(model), "-o", str(output), "--force"]
    if seconds is None:
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
        seconds = time.monotonic() - start

    def check(status: int, said: str, sent: signal.Signals) -> str:
        left = sorted(path.name for path in place.iterdir() if path != output)
        if sent is not signal.SIGKILL and left:
            return f"{', '.join(left)} is left behind"
        if was_there and not output.exists():
            return "the bundle that was there is gone"
        if output.exists() and (problem := _problem(output)):
            return problem
        last = said.splitlines()[-1] if said else ""
        if sent is signal.SIGKILL:
            return ""
        if status in (0, -sent):
            return "" if output.exists() else "the build ended well and there is no bundle"
        return "" if last.startswith("interrupted") else f"the last line said is {last!r}"

    bad: list[str] = []
    outcomes: Counter[str] = Counter()
    for number in range(count):
        shutil.rmtree(place)
        place.mkdir()
        was_there = number % 2 == 0
        if was_there:
            shutil.copytree(bundle, output)
        more, ended = _interrupt(command, seconds, 1, rng, check)
        bad += more
        outcomes.update(ended)
    return bad, {f"build {key}": value for key, value in outcomes.items()}


def _whole_run(command: Sequence[str], output: Path) -> tuple[bytes, float]:
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    seconds = time.monotonic() - start
    whole = output.read_bytes()
    output.unlink()
    shutil.rmtree(f"{output}.job")
    return whole, seconds


def _interrupt(
    command: Sequence[str], seconds: float, count: int, rng: random.Random, check: Check
) -> tuple[list[str], dict[str, int]]:
    bad: list[str] = []
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        sent = rng.choice(SIGNALS)
        delay = seconds * rng.choice((rng.uniform(0, 0.1), rng.random(), rng.uniform(0.85, 1.1)))
        status, said = run_interrupted(command, sent, delay)
        outcomes[f"ended {status}"] += 1
        problem = check(status, said, sent)
        if status not in (0, 128 + sent, -sent) or "Traceback" in said:
            problem = f"status {status}, {said[-600:]!r}; {problem}"
        if problem:
            bad.append(f"{command[1]}, {sent.name} after {delay:.3f} s: {problem}")
    return bad, dict(outcomes)


def run_interrupted(command: Sequence[str], sent: signal.Signals, delay: float) -> tuple[int, str]:
    """Run a module, send it a signal; its status and what it said on standard error."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=said
        )
        while not _takes(process.pid, signal.SIGTERM):
            if process.poll() is not None:
                return process.returncode, "Traceback: it never took charge of signals"
            time.sleep(0.0005)
        time.sleep(delay)
        process.send_signal(sent)
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        said.seek(0)
        return status, said.read().decode(errors="replace")


def _takes(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal; Python itself has none for SIGTERM."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line for line in status.splitlines() if line.startswith("SigCgt:")), "SigCgt: 0")
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def _problem(bundle: Path) -> str:
    from llama_runtime.bundle import open_bundle
    from llama_runtime.errors import CaravanError

    try:
        verification = open_bundle(bundle, verify="full").manifest.verification
    except CaravanError as error:
        return f"a half-built bundle is in place: {error}"
    return "" if verification else "a bundle that was never verified is in place"


if __name__ == "__main__":
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="caravan-")
    main()
