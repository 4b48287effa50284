"""Break the code one line at a time, and see that the tests notice.

Each fault of tests/mutants.toml is made in a copy of the project, never in the working tree, and
the tests that it names run there: every one of them must fail, by an assertion or with the error
that the list says. First all of them must pass without any fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from scripts.mutant_runs import SOURCES, Outcome, Runs

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "mutants.toml"
COPIED = ("pyproject.toml", "tests", *SOURCES)
PACKAGES = ("llama_decoder", "llama_export", "llama_runtime")
ASSERTIONS = ("assert ", "AssertionError", "Failed: DID NOT RAISE")


class ListError(Exception):
    """The list of faults, or what it names, is not as it should be."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One line that somebody might have written wrong.

    Attributes:
        name: short and unique.
        file: what holds the line, relative to the project.
        line: the right line, without its indentation; it occurs once in the file.
        becomes: the wrong one.
        tests: node ids, each of which must fail; without ``[...]``, one of its cases at least.
        shows: what a user would see, as a sentence.
        error: what the tests fail with where it is no assertion, such as "RuntimeError: slot".
    """

    name: str
    file: str
    line: str
    becomes: str
    tests: tuple[str, ...]
    shows: str
    error: str | None = None

    @property
    def module(self) -> str:
        """The import name of the file."""
        return ".".join(Path(self.file).with_suffix("").parts[1:])

    def apply(self, root: Path) -> str:
        """The text of the file with the fault in it.

        Raises:
            ListError: the line isn't there exactly once, or what it becomes can't be compiled.
        """
        path = root / self.file
        if not path.is_file():
            raise ListError(f"{self.name}: there is no {self.file}")
        lines = path.read_text(encoding="utf-8").split("\n")
        places = [i for i, line in enumerate(lines) if line.strip() == self.line]
        if len(places) != 1:
            found = f"{self.file} has this line {len(places)} times"
            raise ListError(f"{self.name}: {found}: {self.line}")
        (at,) = places
        indentation = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at] = indentation + self.becomes
        text = "\n".join(lines)
        try:
            compile(text, self.file, "exec")
        except SyntaxError as error:
            raise ListError(f"{self.name}: what the line becomes is no Python: {error}") from error
        return text


def read_faults(path: Path) -> list[Fault]:
    """The faults of a list, each checked on its own.

    Raises:
        ListError: a fault is incomplete, or two have one name.
    """
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
        faults = [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ListError(f"{path.name} is no list of faults: {error!r}") from error
    for fault in faults:
        lines = (fault.line, fault.becomes)
        if lines[0] == lines[1] or any(line != line.strip() or "\n" in line for line in lines):
            raise ListError(f"{fault.name}: it takes one line and another one, without indentation")
        if not fault.tests:
            raise ListError(f"{fault.name}: it names no test")
    names = [fault.name for fault in faults]
    if len(set(names)) < len(names):
        raise ListError(f"{path.name}: a name comes twice")
    return faults


def select(faults: Sequence[Fault], names: Sequence[str]) -> list[Fault]:
    """The faults of these names; all if there are none.

    Raises:
        ListError: a name is no fault's.
    """
    unknown = sorted(set(names) - {fault.name for fault in faults})
    if unknown:
        raise ListError(f"no fault has the name {', '.join(unknown)}")
    return [fault for fault in faults if not names or fault.name in names]


def check(faults: Sequence[Fault], root: Path) -> None:
    """See that every fault can be made and its tests are there, without running anything.

    Raises:
        ListError: names all that is wrong.
    """
    problems = []
    for fault in faults:
        try:
            fault.apply(root)
        except ListError as error:
            problems.append(str(error))
        for test in fault.tests:
            file, *names = test.partition("[")[0].split("::")
            path = root / file
            text = path.read_text(encoding="utf-8") if path.is_file() else ""
            if not names or not all(f"def {n}(" in text or f"class {n}" in text for n in names):
                problems.append(f"{fault.name}: there is no test {test}")
    if problems:
        raise ListError("\n".join(problems))


def verdict(fault: Fault, outcome: Outcome) -> tuple[str, str]:
    """Whether a fault was noticed: "killed", "SURVIVED" or "BROKEN", and why."""
    if outcome.code not in (0, 1) or not outcome.cases:
        return "BROKEN", f"the tests did not run: {outcome.last_line}"
    expected = ASSERTIONS if fault.error is None else (fault.error,)
    for test in fault.tests:
        bad = [case for case in outcome.of(test) if case.result != "passed"]
        if not bad:
            return "SURVIVED", f"{test} passes, although {fault.shows}"
        noticed = [c for c in bad if c.result == "failure" and c.message.startswith(expected)]
        if not noticed:
            return "BROKEN", f"{bad[0].name} has another {bad[0].result}: {bad[0].message}"
    return "killed", noticed[0].message


def run_all(faults: Sequence[Fault], jobs: int, limit: int) -> int:
    """Make every fault and say what came of it.

    Args:
        faults: at least one.
        jobs: runs at a time.
        limit: seconds that one test may take.

    Returns:
        How many were not noticed.

    Raises:
        ListError: a fault can't be made, or a test fails without one.
    """
    tests = sorted({test for fault in faults for test in fault.tests})
    with tempfile.TemporaryDirectory(prefix="caravan-mutants-") as name:
        folder = Path(os.path.realpath(name))
        original = _copy(ROOT, folder / "original")
        check(faults, original)
        runs = Runs(folder, limit)
        pool = ThreadPoolExecutor(jobs)
        try:
            started = time.monotonic()
            middle = -(-len(tests) // jobs)
            parts = [tests[i : i + middle] for i in range(0, len(tests), middle)]
            for outcome in pool.map(lambda part: runs.run(original, PACKAGES, part), parts):
                _require_passed(outcome)
            _say(f"{len(tests)} tests pass without a fault", started)

            def make(fault: Fault) -> tuple[Fault, float, str, str]:
                begun = time.monotonic()
                copy = _copy(original, folder / fault.name)
                (copy / fault.file).write_text(fault.apply(original), encoding="utf-8")
                result = verdict(fault, runs.run(copy, [fault.module], fault.tests))
                shutil.rmtree(copy)
                return fault, begun, *result

            missed = 0
            for done in as_completed([pool.submit(make, fault) for fault in faults]):
                fault, begun, word, why = done.result()
                missed += word != "killed"
                _say(f"{word:8} {fault.name}", begun, "" if word == "killed" else f": {why}")
            _say(f"{len(faults) - missed} of {len(faults)} faults are noticed", started)
        finally:
            runs.stop()
            pool.shutdown(cancel_futures=True)
    return missed


def _copy(root: Path, to: Path) -> Path:
    to.mkdir()
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(root / name, to / name)
    return to


def _require_passed(outcome: Outcome) -> None:
    bad = [case for case in outcome.cases if case.result != "passed"]
    if outcome.code != 0 or bad:
        names = "".join(f"\n{case.name}: {case.message}" for case in bad)
        raise ListError(f"not all tests pass without a fault: {outcome.last_line}{names}")


def _say(text: str, since: float, more: str = "") -> None:
    print(f"{text} ({time.monotonic() - since:.1f} s){more}", flush=True)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    """Run the command line; 0 if all faults are noticed, 1 if not, 2 if the list is wrong."""
    parser = argparse.ArgumentParser(prog="scripts/test --mutants", description=__doc__)
    parser.add_argument("name", nargs="*", help="a fault, by its name; none stands for all")
    parser.add_argument("--list", type=Path, default=FAULTS, help="another list of faults")
    parser.add_argument("--check", action="store_true", help="check the list and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--limit", type=int, default=120, help="seconds of one test (120)")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        faults = select(read_faults(given.list), given.name)
        if given.check:
            check(faults, ROOT)
            return 0
        return 1 if run_all(faults, given.jobs, given.limit) else 0
    except ListError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
