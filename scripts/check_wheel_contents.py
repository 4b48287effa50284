"""What the wheel and the sdist hold, beside what the checkout holds."""

from __future__ import annotations

import email.parser
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from email.message import Message
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# What programs read while they run: without it, they fail where no test of the checkout sees it.
NEEDED = (
    "llama_decoder/py.typed",
    "llama_export/py.typed",
    "llama_runtime/py.typed",
    "llama_export/calibration/texts/*.txt",
    "llama_export/calibration/licences/*.txt",
    "llama_runtime/evaluation/texts/*.txt",
    "llama_runtime/evaluation/licences/*.txt",
    "llama_runtime/backends/kernels/*.cu",
    "llama_runtime/pages/*.css",
    "llama_runtime/server/page/*.css",
    "llama_runtime/server/page/*.html",
    "llama_runtime/server/page/*.js",
    "llama_runtime/server/page/*.svg",
)
KINDS = {".py", ".typed", ".txt", ".cu", ".css", ".html", ".js", ".svg"}
LICENCES = ("LICENSE", "NOTICE")
_TESTS = re.compile(r"(^|/)(tests?/|test_[^/]*\.py$|conftest\.py$)")
_EXTRA = re.compile(r"""extra == ['"]([^'"]+)['"]""")

Contents = Mapping[str, bytes]


def build(folder: Path) -> tuple[Path, Path]:
    """Build both from the checkout; the wheel and the sdist.

    Args:
        folder: for them.
    """
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist"]
    subprocess.run([*command, "-d", str(folder)], cwd=ROOT, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def wheel_contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sdist_contents(sdist: Path) -> dict[str, bytes]:
    """The files of an sdist, by their name below its one folder."""
    found = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            data = archive.extractfile(member)
            if data is not None:
                found[member.name.partition("/")[2]] = data.read()
    return found


def checkout_files(root: Path = ROOT) -> dict[str, Path]:
    """Files of the checkout that git holds or would take, by name."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    paths = [name.decode() for name in names.split(b"\0") if name]
    return {name: root / name for name in sorted(paths) if (root / name).is_file()}


def wheel_faults(contents: Contents, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with a wheel.

    Args:
        contents: of the wheel.
        root: of the checkout.
    """
    project = _project(root)
    folders = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    files = checkout_files(root)
    expected = {
        name.partition("/")[2]: path
        for name, path in files.items()
        if any(name.startswith(f"{folder}/") for folder in folders)
    }
    named = {name for name in contents if not _of_metadata(name)}
    yield from _differences("the wheel", {name: contents[name] for name in named}, expected)
    yield from (f"the wheel holds a test: {name}" for name in sorted(named) if _TESTS.search(name))
    for name in sorted(named):
        if Path(name).suffix not in KINDS and Path(name).name != "py.typed":
            yield f"the wheel holds a file of an unknown kind: {name}"
    for pattern in NEEDED:
        if not any(fnmatch(name, pattern) for name in named):
            yield f"the wheel lacks {pattern}"
    yield from _metadata_faults(contents, project["project"], root)


def sdist_faults(contents: Contents, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with an sdist.

    Args:
        contents: of the sdist.
        root: of the checkout.
    """
    included = _project(root)["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    included = [*included, "README.md", "pyproject.toml", ".gitignore"]
    expected = {
        name: path
        for name, path in checkout_files(root).items()
        if any(name == part or name.startswith(f"{part}/") for part in included)
    }
    found = {name: data for name, data in contents.items() if name != "PKG-INFO"}
    yield from _differences("the sdist", found, expected)
    for name in included:
        if name not in contents and not any(one.startswith(f"{name}/") for one in contents):
            yield f"the sdist lacks {name}"


def _differences(what: str, found: Contents, expected: Mapping[str, Path]) -> Iterator[str]:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            yield f"{what} lacks a file of the checkout: {name}"
        elif name not in expected:
            yield f"{what} holds a file that the checkout doesn't: {name}"
        elif found[name] != expected[name].read_bytes():
            yield f"{what} holds another version of {name}"


def _metadata_faults(contents: Contents, project: Mapping[str, Any], root: Path) -> Iterator[str]:
    folder = next((name.partition("/")[0] for name in contents if _of_metadata(name)), "")
    try:
        metadata = email.parser.BytesParser().parsebytes(contents[f"{folder}/METADATA"])
        tag = contents[f"{folder}/WHEEL"].decode()
        entries = contents[f"{folder}/entry_points.txt"].decode()
    except KeyError as error:
        yield f"the wheel lacks {error}"
        return
    for name in LICENCES:
        held = contents.get(f"{folder}/licenses/{name}")
        if held != (root / name).read_bytes():
            yield f"the wheel lacks {name}, or holds another"
    if "\nTag: py3-none-any\n" not in tag:
        yield f"the wheel is for some systems only: {tag}"
    source = (root / "runtime/llama_runtime/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"', source, re.MULTILINE)
    for field, value in {
        "Name": project["name"],
        "Version": version[1] if version else None,
        "License-Expression": project["license"],
        "Requires-Python": project["requires-python"],
        "Summary": project["description"],
    }.items():
        if metadata[field] != value:
            yield f"{field} is {metadata[field]!r} and not {value!r}"
    if metadata.get_payload() != (root / "README.md").read_text(encoding="utf-8"):
        yield "the description isn't README.md"
    for name, target in project["scripts"].items():
        if f"{name} = {target}\n" not in f"{entries}\n":
            yield f"the wheel has no command {name}"
    yield from _requirement_faults(metadata, project)


def _requirement_faults(metadata: Message, project: Mapping[str, Any]) -> Iterator[str]:
    """The extras of the wheel are those of pyproject.toml, line for line."""
    lines = {"": project["dependencies"], **project["optional-dependencies"]}
    own = canonicalize_name(project["name"])

    def asked(extra: str) -> Iterator[str]:
        """What an extra asks for; of an extra that it names, what that asks for."""
        for line in lines[extra]:
            wanted = Requirement(line)
            if canonicalize_name(wanted.name) != own:
                yield _key(line)
            for other in sorted(wanted.extras if canonicalize_name(wanted.name) == own else ()):
                yield from asked(other)

    expected = {(extra, requirement) for extra in lines for requirement in asked(extra)}
    found = set()
    for line in metadata.get_all("Requires-Dist", []):
        match = _EXTRA.search(line)
        found.add((match[1] if match else "", _key(line)))
    for extra, requirement in sorted(found ^ expected):
        where = "the wheel" if (extra, requirement) in found else "pyproject.toml"
        yield f"only {where} has in [{extra}] {requirement}"


def _key(line: str) -> str:
    """A requirement without its marker, in one spelling."""
    wanted = Requirement(line)
    extras = f"[{','.join(sorted(wanted.extras))}]" if wanted.extras else ""
    return f"{canonicalize_name(wanted.name)}{extras}{wanted.specifier}"


def _of_metadata(name: str) -> bool:
    return name.partition("/")[0].endswith(".dist-info")


def _project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
