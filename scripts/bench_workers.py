"""See ``scripts/bench_workers``."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

from scripts.bench_machine import machine

ASKED = 0.95  # of linear throughput
NEAR_TIE = 0.05  # nats between two tokens that rounding may exchange
SCORED = 8  # every so many rows reports how likely its tokens were, which costs time
KILL_AT = 0.3  # of the rows, when a process is killed
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have"

Results = dict[str, Any]


def main() -> None:
    """Run the job in each way, and compare."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        bundle = options.bundle or _built(folder / "bundle", options.shape)
        rows = folder / "rows.jsonl"
        _write_rows(rows, options.rows)
        count = options.workers
        one = ["--devices", "0"] if not options.cpu else []
        ways: dict[str, list[str]] = {"one": one}
        if not options.cpu:
            ways["devices"] = ["--devices", ",".join(map(str, range(count)))]
        ways["workers"] = ways["killed"] = ["--workers", str(count)]
        found: Results = {**machine(), "gpus": _gpus(), "rows": options.rows, "num_workers": count}
        found["asked_of_linear"] = ASKED
        for way, arguments in ways.items():
            output = folder / f"{way}.jsonl"
            command = [sys.executable, "-m", "llama_runtime", "batch", str(rows), "--no-chat"]
            command += ["--bundle", str(bundle), "--output", str(output), *arguments]
            command += ["--max-batch", str(options.max_batch), "--quiet"]
            found[way] = _run(command, output, options.rows, kill=way == "killed")
            found[way] |= compared(folder / "one.jsonl", output)
            rate = found[way]["tokens_per_s"]
            found[way]["of_linear"] = rate / found["one"]["tokens_per_s"] / count
            print(f"{way:8} {_shown(found[way])}", flush=True)
            verified = subprocess.run([*command, "--verify"], check=False).returncode == 0
            found[way]["verified"] = verified
    print(json.dumps(found))
    sys.exit(not all(found[way]["verified"] and not found[way]["apart"] for way in ways))


def compared(expected: Path, found: Path) -> Results:
    """How results differ: rows that are the same, that part, and where those with scores do.

    Tokens on a GPU are the same up to rounding, which decides between two that are as likely.
    """
    same = parted = near = apart = 0
    with expected.open() as left, found.open() as right:
        for pair in zip_longest(left, right):
            if None in pair:
                apart += 1
                continue
            a, b = map(json.loads, pair)
            if a["index"] != b["index"] or a["prompt"] != b["prompt"]:
                apart += 1
            elif a["token_ids"] == b["token_ids"]:
                same += 1
            elif "logprobs" not in a:
                parted += 1
            elif _is_near_tie(a, b):
                near += 1
            else:
                apart += 1
    return {"same": same, "parted": parted, "near_ties": near, "apart": apart}


def _is_near_tie(a: Results, b: Results) -> bool:
    """Whether two rows part where the two tokens were as likely as each other."""
    pairs = zip(a["token_ids"], b["token_ids"], strict=False)
    at = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
    if at is None:
        return False
    likely = {item["token_id"]: item["logprob"] for item in a["logprobs"][at]["top"]}
    other = likely.get(b["token_ids"][at])
    return other is not None and abs(a["logprobs"][at]["logprob"] - other) <= NEAR_TIE


def _run(command: list[str], output: Path, rows: int, *, kill: bool) -> Results:
    started = time.monotonic()
    process = subprocess.Popen(command)
    if kill:
        _kill_a_worker(process, output, rows)
    if status := process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    summary = json.loads(Path(f"{output}.job", "summary.json").read_text())
    statistics = summary["statistics"]
    return {
        "seconds": time.monotonic() - started,
        "working_seconds": statistics["seconds"],
        "completion_tokens": statistics["completion_tokens"],
        "tokens_per_s": statistics["completion_tokens"] / statistics["seconds"],
        "rows": statistics["rows"],
        "failed": statistics["failed"],
    }


def _kill_a_worker(process: subprocess.Popen[bytes], output: Path, rows: int) -> None:
    while process.poll() is None:
        time.sleep(0.2)
        if output.exists() and sum(1 for _ in output.open("rb")) >= KILL_AT * rows:
            os.kill(_workers(process.pid)[0], signal.SIGKILL)
            return


def _workers(parent: int) -> list[int]:
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in listed}
    return [pid for pid, command in commands.items() if b"worker_process" in command]


def _write_rows(path: Path, count: int) -> None:
    """Prompts of 16 to 256 words and as many new tokens; some with the likeliest of each place."""
    numbers, words = random.Random(0), WORDS.split()
    with path.open("w") as file:
        for index in range(count):
            prompt = " ".join(
                [f"Row {index}:", *numbers.choices(words, k=numbers.randint(16, 256))]
            )
            row = {"prompt": prompt, "max_tokens": numbers.randint(16, 256), "ignore_eos": True}
            row["temperature"] = 0.0
            if index % SCORED == 0:
                row |= {"logprobs": True, "top_logprobs": 10}
            file.write(json.dumps(row) + "\n")


def _built(bundle: Path, shape: str) -> Path:
    from llama_export.build import build_bundle

    build_bundle(shape, bundle, target="cuda", precision="fp16", random_seed=0)
    return bundle


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return done.stdout.strip().splitlines()


def _shown(found: Results) -> str:
    return (
        f"{found['tokens_per_s']:8,.0f} tokens/s, {found['of_linear']:.2f} of linear; "
        f"{found['rows']} rows: {found['same']} the same, {found['parted']} part, of the scored "
        f"{found['near_ties']} at a near tie, {found['apart']} elsewhere"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--shape", default="Llama-3.1-8B")
    parser.add_argument("--workers", type=int, default=len(_gpus()) or 2)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--max-batch", type=int, default=128)
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
