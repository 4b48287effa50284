"""Proof that a batch job loses no row and does none twice; scripts/prove_resume runs it.

One job, of rows that are short and long, right and wrong, in three forms: results in the order of
the rows, results as rows end, and requests of OpenAI's API with their errors apart. Each is run
once without interruption, and then over and over with the same command while it is killed, asked to
end, or has no room on the disk, until it is done. What it has written then must be what the first
run wrote, row for row.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts.resume_rows import openai_rows, prompt_rows
from scripts.small_disk import small_disk
from tests.tiny_model import build_tiny_bundle

FORMS = ("ordered", "unordered", "openai")
NUM_ROWS = 400
LIMIT_S = 120.0
_STOPPED = "; the same command goes on"


def main() -> None:
    """Parse arguments, run, print what differs, figures, and a last line of JSON."""
    parser = argparse.ArgumentParser(prog="scripts/prove_resume")
    parser.add_argument("--bundle", type=Path, help="a bundle (default: a tiny one is built)")
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs for each form (50)")
    parser.add_argument("--terms", type=int, default=15, help="SIGTERMs for each form (15)")
    parser.add_argument("--rows", type=int, default=NUM_ROWS, help=f"of the job ({NUM_ROWS})")
    parser.add_argument("--seed", type=int, default=0, help="of rows and moments (0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = args.bundle or build_tiny_bundle(folder)
        start = [sys.executable, "-m", "llama_runtime"]
        proof = Proof(start, bundle, folder, args.seed, args.rows)
        for form in FORMS:
            proof.prove(form, kills=args.kills, terms=args.terms, small_disk=True)
    for line in proof.bad:
        print(line)
    print(json.dumps({"passed": not proof.bad, "seed": args.seed, **proof.figures}))
    sys.exit(bool(proof.bad))


@dataclass
class Proof:
    """Runs one job in several forms, and collects what goes wrong.

    Args:
        start: of a command line that is ``llama-run``.
        bundle: that it runs.
        folder: for the rows and results.
        seed: of the rows, and of the moments at which runs are ended.
        num_rows: of the job.

    Attributes:
        bad: what went wrong, each a sentence.
        figures: how many runs were ended, and how.
    """

    start: Sequence[str]
    bundle: Path
    folder: Path
    seed: int = 0
    num_rows: int = NUM_ROWS
    bad: list[str] = field(default_factory=list)
    figures: Counter[str] = field(default_factory=Counter)

    def prove(self, form: str, *, kills: int, terms: int, small_disk: bool) -> None:
        """End runs of the job in one form.

        Args:
            form: one of ``FORMS``.
            kills: how many get SIGKILL.
            terms: how many get SIGTERM.
            small_disk: whether it is also run on a disk without room.
        """
        rows = self.folder / f"{form}.jsonl"
        rng = random.Random(f"{self.seed} {form}")
        make = openai_rows if form == "openai" else prompt_rows
        rows.write_bytes(b"".join(make(self.num_rows, self._model(), rng)))
        job = _Job(self, form, rows, self.folder / f"{form}.results.jsonl")
        job.run_whole()
        for sent, count in ((signal.SIGKILL, kills), (signal.SIGTERM, terms)):
            if count:
                job.run_ended(sent, count, rng)
        if small_disk:
            job.run_without_room()

    def _model(self) -> str:
        name: str = json.loads((self.bundle / "manifest.json").read_text())["name"]
        return name


class _Job:
    """The job in one form.

    Args:
        proof: collects what goes wrong.
        form: one of ``FORMS``.
        rows: the file of the rows.
        output: where an uninterrupted run writes.
    """

    def __init__(self, proof: Proof, form: str, rows: Path, output: Path) -> None:
        self._proof = proof
        self._form = form
        self._rows = rows
        self._whole_output = output
        self._whole: list[list[str]] = []
        self._loading = self._working = (
            0.0  # seconds of a whole run, before its first result or not
        )

    def run_whole(self) -> None:
        """Run the job without interruption, and see how long that takes."""
        begin = time.monotonic()
        process, said = self._started(self._whole_output)
        while process.poll() is None and not _size(self._whole_output):
            time.sleep(0.002)
        self._loading = time.monotonic() - begin
        status = process.wait(LIMIT_S)
        self._working = time.monotonic() - begin - self._loading
        self._whole = self._contents(self._whole_output)
        if status != 1:  # some rows are wrong
            self._complain("a whole run", status, _text(said))

    def run_ended(self, sent: signal.Signals, count: int, rng: random.Random) -> None:
        """Run the job until so many runs of it have got the signal, and it is done.

        Half of the moments are anywhere in a run, most of them while it starts; the others come
        soon after the first result, so that one job lives through many.
        """
        output, done = self.folder_of(sent) / "out.jsonl", 0
        while done < count:
            status = 0
            while status != 1 or done < count:
                soon = self._loading + 2 * rng.random() * self._working / max(count, 1)
                delay = soon if rng.random() < 0.5 else rng.uniform(0, 1.1 * self._loading)
                status, said, was_sent = self._run_for(
                    output, delay, sent if done < count else None
                )
                done += was_sent
                if status == 1:
                    break
                if status not in (-sent, 128 + sent) or not _was_ended_well(status, said):
                    self._complain(f"{sent.name} after {delay:.3f} s", status, said)
                    return
            self._proof.figures[f"{self._form} {sent.name} jobs"] += 1
            self._check(f"{done} {sent.name}s", output)
            _remove(output)
        self._proof.figures[f"{self._form} {sent.name}"] += done

    def run_without_room(self) -> None:
        """Run the job where its results don't fit, with more room each time."""
        with small_disk(self._proof.folder / "disk") as disk:
            output = disk.path / "out.jsonl"
            times = 0
            while (ended := self._run(output, disk.limit))[0] == 1 and _is_full(ended[1]):
                times += 1
                disk.grow()
            if ended[0] != 1 or not times or times > 100:
                self._complain(f"a full disk, {times} times", *ended)
            disk.grow()  # to verify takes room too
            self._check(f"a disk that was full {times} times", output)
            self._proof.figures[f"{self._form} {disk.kind}"] += times

    def folder_of(self, sent: signal.Signals) -> Path:
        """Where the results of runs are that get a signal."""
        folder = self._proof.folder / f"{self._form} {sent.name}"
        folder.mkdir()
        return folder

    def _command(self, output: Path) -> list[str]:
        more = ["--unordered"] if self._form == "unordered" else []
        return [
            *self._proof.start,
            *("batch", str(self._rows), "-o", str(output), "--bundle", str(self._proof.bundle)),
            *("--max-tokens", "40", "--max-batch", "4", "--threads", "1", "--seed", "0"),
            *("--no-chat", "--max-len", "200", *more),
        ]

    def _started(
        self, output: Path, limit: int | None = None
    ) -> tuple[subprocess.Popen[bytes], Path]:
        def limited() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        said = self._proof.folder / "said"
        with said.open("wb") as file:
            command = self._command(output)
            # Nothing else runs in this process that a fork could tear.
            process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=file, preexec_fn=limited
            )
        return process, said

    def _run(self, output: Path, limit: int | None) -> tuple[int, str]:
        process, said = self._started(output, limit)
        return process.wait(LIMIT_S), _text(said)

    def _run_for(
        self, output: Path, delay: float, sent: signal.Signals | None
    ) -> tuple[int, str, bool]:
        """Run, and send the signal after so many seconds; whether it still ran then."""
        process, said = self._started(output)
        was_sent = False
        if sent is not None:
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                process.send_signal(sent)
                was_sent = True
        return process.wait(LIMIT_S), _text(said), was_sent

    def _contents(self, output: Path) -> list[list[str]]:
        """The lines of results and errors, without what may differ."""
        errors = output.with_name(output.name.removesuffix(".jsonl") + ".errors.jsonl")
        files = [_lines(path) for path in (output, errors)]
        if self._form == "openai":
            files = [[_untimed(line) for line in lines] for lines in files]
        return [sorted(lines) for lines in files] if self._form == "unordered" else files

    def _check(self, after: str, output: Path) -> None:
        """Compare what is there with the whole run, and have the command verify it."""
        found = self._contents(output)
        if sum(map(len, found)) != self._proof.num_rows:
            self._bad(after, f"there are {list(map(len, found))} results")
        elif found != self._whole:
            differ = [
                (one, other)
                for ones, others in zip(found, self._whole, strict=True)
                for one, other in zip(ones, others, strict=False)
                if one != other
            ]
            self._bad(after, f"{len(differ)} results differ, such as {differ[:1]}")
        command = [*self._command(output), "--verify"]
        verified = subprocess.run(command, capture_output=True, text=True, check=False)
        if verified.returncode:
            self._complain(f"verifying after {after}", verified.returncode, verified.stderr)

    def _complain(self, after: str, status: int, said: str) -> None:
        self._bad(after, f"status {status}, {said[-600:]!r}")

    def _bad(self, after: str, what: str) -> None:
        self._proof.bad.append(f"{self._form}, {after}: {what}")


def _is_full(said: str) -> bool:
    last = said.splitlines()[-1] if said else ""
    return "No space left on device" in last or "File too large" in last


def _was_ended_well(status: int, said: str) -> bool:
    """Whether a run that was asked to end has said so; one that is killed can't."""
    last = said.splitlines()[-1] if said else ""
    return status < 0 or last == "interrupted" or last.endswith(_STOPPED)


def _remove(output: Path) -> None:
    shutil.rmtree(output.parent)
    output.parent.mkdir()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines(keepends=True) if path.exists() else []


def _untimed(line: str) -> str:
    """A result without the moment of its answer."""
    record = json.loads(line)
    record["response"]["body"].pop("created", None)
    return json.dumps(record)


if __name__ == "__main__":
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="caravan-")
    main()
