"""Clean virtual environments outside the checkout, in which a wheel is what is installed."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

ROUNDS = 9  # of what is timed
_SECONDS = 600  # for one command
_CHARACTERS = 3000  # of what a program says when it fails
_PATH = os.pathsep.join(["/usr/bin", "/bin"])
_IMPORT = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"


class Venv:
    """An environment and an empty folder to run in.

    Args:
        folder: for both, which isn't there.
        with_pip: whether pip is in it, which only some programs need.
    """

    def __init__(self, folder: Path, *, with_pip: bool = False) -> None:
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.bin = folder / "venv" / "bin"
        self._path = folder / "venv"
        without = () if with_pip else ("--without-pip",)
        subprocess.run([sys.executable, "-m", "venv", *without, str(self._path)], check=True)

    def install(self, *arguments: str, offline: bool = False) -> float:
        """Install, as pip takes it; the seconds that it takes.

        Args:
            arguments: requirements and options.
            offline: without any configuration that names a package index or folder.

        Raises:
            RuntimeError: pip fails.
        """
        began = time.monotonic()
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), "install"]
        quiet = ["--quiet", "--disable-pip-version-check"]
        environment = pip_environment()
        if offline:
            environment = {k: v for k, v in environment.items() if not k.startswith("PIP_")}
            environment["PIP_CONFIG_FILE"] = os.devnull
        quietly([*command, *quiet, *arguments], self.home, environment)
        return time.monotonic() - began

    def start(self, *command: str) -> list[str]:
        """A command line whose program is the environment's own."""
        return [str(self.bin / command[0]), *command[1:]]

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a user who has set none."""
        path = os.pathsep.join([str(self.bin), _PATH])
        return {"PATH": path, "HOME": str(self.home), "LANG": "C.UTF-8"}

    def run(
        self, *command: str, expect: int = 0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in its empty folder.

        Args:
            command: its name and arguments.
            expect: the status that it is to end with.
            stdin: what it reads.

        Raises:
            RuntimeError: it ends with another.
        """
        ended = subprocess.run(
            self.start(*command),
            env=self.environment,
            cwd=self.home,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if ended.returncode != expect:
            said = f"{ended.stdout[-_CHARACTERS:]}{ended.stderr[-_CHARACTERS:]}"
            raise RuntimeError(f"{command} ended with {ended.returncode}, not {expect}: {said}")
        return ended

    def python(self, code: str) -> str:
        """What a program in Python says."""
        return self.run("python", "-c", code).stdout

    def present(self, modules: Sequence[str]) -> list[str]:
        """Those of the modules that can be found."""
        code = f"import importlib.util as u; print([n for n in {list(modules)} if u.find_spec(n)])"
        return [name for name in modules if repr(name) in self.python(code)]

    def versions(self) -> dict[str, str]:
        """What is installed."""
        code = (
            "import json, importlib.metadata as m\n"
            "print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
        )
        found: dict[str, str] = json.loads(self.python(code))
        return found

    def megabytes(self) -> dict[str, float]:
        """The size of what is installed, compiled files included: in all, and the largest five."""
        (site,) = self._path.glob("lib/python*/site-packages")
        sizes: Counter[str] = Counter()
        for path in site.rglob("*"):
            if path.is_file() and not path.is_symlink():
                sizes[path.relative_to(site).parts[0]] += path.stat().st_size
        largest = {name: round(size / 1e6, 1) for name, size in sizes.most_common(5)}
        return {"all": round(sizes.total() / 1e6, 1), **largest}

    def import_seconds(self, module: str) -> float:
        """The median time of a module's import in fresh processes."""
        times = [float(self.python(_IMPORT.format(module))) for _ in range(ROUNDS + 1)]
        return round(statistics.median(times[1:]), 4)

    def wall_seconds(self, *command: str) -> float:
        """The median time that a command takes, from its start to its end."""
        times = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            self.run(*command)
            times.append(time.perf_counter() - began)
        return round(statistics.median(times[1:]), 4)


def pip_environment() -> dict[str, str]:
    """The variables for pip: without those that lead to the checkout or another environment."""
    others = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV")
    return {name: value for name, value in os.environ.items() if name not in others}


def quietly(
    command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run what installs or builds, in a folder outside the checkout.

    Args:
        command: the program and its arguments.
        folder: to run it in.
        environment: its variables; None for those of ``pip_environment``.

    Raises:
        RuntimeError: it fails; with the end of what it said.
    """
    ended = subprocess.run(
        command,
        env=pip_environment() if environment is None else environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stdout[-_CHARACTERS:]}")
