"""Runs of pytest in copies of the project, for ``scripts.mutants``."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

SOURCES = ("models", "export", "runtime")
MODEL = Path(__file__).resolve().parents[1] / "artifacts" / "SmolLM2-135M-Instruct.Q4_1.gguf"
RUN_SECONDS = 300  # of one run of pytest
# By START: modules of the server import anyio, which has a plugin for pytest.
_ALREADY_IMPORTED = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"

# What pytest is started with: the module that was changed must import, and from the copy.
START = """
import importlib, os, sys
copy, *modules = sys.argv[1].split(os.pathsep)
for name in modules:
    path = os.path.realpath(importlib.import_module(name).__file__)
    assert path.startswith(copy + os.sep), f"{name} is imported from {path}"
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One test case of a run.

    Attributes:
        name: node id.
        result: "passed", "failure", "skipped", or "error" if it did not get to its body.
        message: why it isn't "passed".
    """

    name: str
    result: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run.

    Attributes:
        code: pytest's exit status; None if it had to be ended.
        last_line: of its output.
        cases: what it reported.
    """

    code: int | None
    last_line: str
    cases: list[Case]

    def of(self, test: str) -> list[Case]:
        """The cases that a node id names."""
        return [case for case in self.cases if test in (case.name, case.name.partition("[")[0])]


class Runs:
    """Runs of pytest in copies, all of which end with this program.

    Args:
        folder: for what the tests write.
        limit: seconds that one test may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(self, copy: Path, modules: Sequence[str], tests: Sequence[str]) -> Outcome:
        """Run tests in a copy.

        Args:
            copy: of the project.
            modules: what must be imported from there.
            tests: node ids.
        """
        scratch = Path(tempfile.mkdtemp(dir=self._folder))
        (scratch / "tmp").mkdir()
        report = scratch / "report.xml"
        command = [sys.executable, "-c", START, os.pathsep.join([str(copy), *modules])]
        command += ["-q", "--tb=no", "-p", "no:cacheprovider", "-o", f"timeout={self._limit}"]
        command += ["-W", _ALREADY_IMPORTED]
        command += [f"--junitxml={report}", f"--basetemp={scratch / 'base'}", *tests]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(copy / source) for source in SOURCES),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(scratch / "tmp"),
            "LLAMA_EXPORT_MODEL": os.environ.get("LLAMA_EXPORT_MODEL", str(MODEL)),
        }
        try:
            with self._started(command, copy, environment) as process:
                try:
                    output, _ = process.communicate(timeout=RUN_SECONDS)
                except subprocess.TimeoutExpired:
                    return Outcome(None, f"it did not end within {RUN_SECONDS} s", [])
            last = output.strip().rpartition("\n")[2]
            return Outcome(process.returncode, last, _cases(report))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                _end(process)

    @contextlib.contextmanager
    def _started(
        self, command: list[str], folder: Path, environment: dict[str, str]
    ) -> Iterator[subprocess.Popen[str]]:
        with self._lock:
            if self._stopped:
                raise InterruptedError("stopped")
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # so that what the tests start can be ended with them
            )
            self._running.add(process)
        try:
            yield process
        finally:
            with self._lock:
                _end(process)
                self._running.remove(process)
            process.wait()


def _cases(report: Path) -> list[Case]:
    """The cases of a JUnit report, which a run that ended early hasn't written."""
    if not report.is_file():
        return []
    cases = []
    for element in ElementTree.parse(report).iter("testcase"):
        name = _node_id(element.get("classname", ""), element.get("name", ""))
        problem = next((e for e in element if e.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            cases.append(Case(name, "passed"))
            continue
        cases.append(Case(name, problem.tag, problem.get("message", "").partition("\n")[0]))
    return cases


def _node_id(classname: str, name: str) -> str:
    """``tests.a.test_b.TestC``, ``test_d[e]`` -> ``tests/a/test_b.py::TestC::test_d[e]``."""
    parts = classname.split(".")
    classes = [part for part in parts if part[:1].isupper()]
    file = "/".join(parts[: len(parts) - len(classes)]) + ".py"
    return "::".join([file, *classes, name])


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started; nothing if they have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
