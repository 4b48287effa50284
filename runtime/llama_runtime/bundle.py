"""Open a bundle, after checking that it is exactly what was built.

A bundle is a directory that ``llama-export build`` writes and everything in this package reads:

    manifest.json           what follows, with sizes and hashes
    decoder.onnx            a graph for each dialect; the manifest names them
    sampler.onnx            the graph that makes tokens of logits
    model.safetensors       the weights, which the graphs point into
    tokenizer.json          the tokenizer
    generation_config.json  EOS ids and the model's own sampling settings
    chat_template.jinja     if the model has one
    chat_fixture.json       conversations, and what the template must make of them
    reference_logprobs.bin  what the source thinks of the evaluation texts, if that was measured
    README.md, LICENSE ...  the model card and the model's terms

Every file is checked before any is used: nothing missing, extra, linked or altered. Hashing a large
model takes seconds, so a bundle that passed is remembered in the user's cache directory until the
size, times or inode of one of its files change. That guards against damage and mix-ups, and not
against somebody who can write to the disk while the program runs.

Standard library only: the exporter describes and writes bundles with the same code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from llama_runtime import verified
from llama_runtime.bundle_limits import (
    CHAT_FIXTURE,
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    TOKENIZER,
    check_limits,
)
from llama_runtime.contract import PAGED, SAMPLER, SLOTS, TENSORRT
from llama_runtime.errors import BundleError, RequestError
from llama_runtime.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileEntry,
    Graph,
    Licence,
    Manifest,
    Source,
)

__all__ = [
    "SCHEMA_VERSION",
    "Bundle",
    "FileEntry",
    "Graph",
    "Licence",
    "Manifest",
    "Source",
    "describe_file",
    "describe_files",
    "open_bundle",
    "write_manifest",
]

logger = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 2**20
_MAX_ENTRIES = 10_000  # files and folders
_REBUILD = "rebuild it with llama-export build"
_TARGETS = {
    SLOTS.name: " --target cpu",
    PAGED.name: " --target cuda",
    TENSORRT.name: " --target tensorrt",
}


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that passed its checks.

    Attributes:
        path: the directory, absolute, symbolic links resolved.
        manifest: what the bundle says about itself.
    """

    path: Path
    manifest: Manifest

    def graph_path(self, dialect: str) -> Path:
        """The ONNX file of a dialect.

        Raises:
            BundleError: if the bundle has no graph in it.
        """
        graphs = {graph.dialect: graph.file for graph in self.manifest.graphs}
        if dialect not in graphs:
            others = ", ".join(name for name in graphs if name != SAMPLER)
            raise BundleError(
                f"{self.path} has no graph in the dialect {dialect}, only in {others}: "
                f"{_REBUILD}{_TARGETS.get(dialect, '')}"
            )
        return self.path / graphs[dialect]

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.path / TOKENIZER

    @property
    def generation_config(self) -> dict[str, object]:
        """The contents of ``generation_config.json``, read from the file.

        Raises:
            BundleError: if it isn't a JSON object.
        """
        path = self.path / GENERATION_CONFIG
        try:
            config = json.loads(_read_text(path))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise BundleError(f"{path} must hold a JSON object, not {type(config).__name__}")
        return config

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, read from the file; None if the bundle has no chat template.

        Raises:
            BundleError: if it isn't UTF-8.
        """
        if CHAT_TEMPLATE not in self.manifest.files:
            return None
        return _read_text(self.path / CHAT_TEMPLATE)

    @property
    def chat_fixture(self) -> str | None:
        """Conversations and their prompts, read from the file; None if the bundle has none.

        Raises:
            BundleError: if it isn't UTF-8.
        """
        if CHAT_FIXTURE not in self.manifest.files:
            return None
        return _read_text(self.path / CHAT_FIXTURE)


def open_bundle(path: Path, *, verify: Literal["full", "size"] | None = None) -> Bundle:
    """Check a bundle and open it.

    Args:
        path: the directory.
        verify: ``full`` hashes every file, ``size`` none; None hashes them unless this bundle
            passed before and its files haven't been touched since.

    Raises:
        BundleError: if the bundle isn't exactly what its manifest describes.
        RequestError: if ``verify`` is something else.
    """
    if verify not in ("full", "size", None):
        raise RequestError(f"verify is {verify!r}; it can be 'full' or 'size'", param="verify")
    if "\0" in os.fspath(path):
        raise BundleError("the bundle's path holds a zero byte, which no path does")
    root = Path(os.path.realpath(path))
    with _readable(root):
        data = _read_manifest(root)
        try:
            manifest = Manifest.from_json(data)
        except BundleError as error:
            raise BundleError(f"the bundle {root} can't be used: {error}") from error
        found = _regular_files(root)
        _check_names_and_sizes(root, manifest, found)
        check_limits(root, manifest)
        if verify != "size":
            state = verified.fingerprint(data, found)
            if verify == "full" or not verified.is_remembered(root, state):
                _check_hashes(root, manifest)
                verified.remember(root, state)
    return Bundle(root, manifest)


def describe_files(directory: Path) -> dict[str, FileEntry]:
    """Size and sha256 of every file of a bundle but its manifest, for the manifest.

    Raises:
        BundleError: if something in the directory is a link or not a regular file.
    """
    with _readable(directory):
        return {
            name: describe_file(directory / name)
            for name in sorted(_regular_files(directory))
            if name != MANIFEST
        }


def describe_file(path: Path) -> FileEntry:
    """Size and sha256 of one file, for the manifest."""
    return FileEntry(path.stat().st_size, _sha256(path))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write ``manifest.json``, replacing an older one at once or not at all.

    Raises:
        BundleError: if `open_bundle` would refuse the manifest.
    """
    data = manifest.to_json().encode("utf-8")
    Manifest.from_json(data)
    unfinished = directory / f".{MANIFEST}.{os.getpid()}"
    try:
        unfinished.write_bytes(data)
        unfinished.replace(directory / MANIFEST)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the bundle in errors of the operating system, such as a missing permission."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"the bundle {path} can't be read: {error}") from error


def _read_text(path: Path) -> str:
    with _readable(path.parent):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text: {error}; {_REBUILD}") from error


def _read_manifest(root: Path) -> bytes:
    path = root / MANIFEST
    if not root.is_dir():
        problem = "is not a directory" if root.exists() else "does not exist"
        raise BundleError(f"the bundle {root} {problem}: build one with llama-export build")
    if not os.path.lexists(path):
        raise BundleError(
            f"{root} is not a bundle, it has no {MANIFEST}: build one with llama-export build"
        )
    size = _regular_file(path).st_size
    if size > _MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{path} has {size:,} bytes and a manifest has {_MAX_MANIFEST_BYTES:,} at most: "
            f"{_REBUILD}"
        )
    return path.read_bytes()


def _regular_files(root: Path) -> dict[str, os.stat_result]:
    """Every file under a directory by its relative name; whatever isn't a plain file is refused."""
    found: dict[str, os.stat_result] = {}
    folders, entries = [root], 0
    while folders:
        folder = folders.pop()
        paths = list(islice(folder.iterdir(), _MAX_ENTRIES))
        entries += len(paths)
        if entries >= _MAX_ENTRIES:
            raise BundleError(f"the bundle {root} holds more than {_MAX_ENTRIES:,} files")
        if not paths and folder != root:
            raise BundleError(f"{folder} is an empty directory: remove it from the bundle")
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                folders.append(path)
            else:
                found[path.relative_to(root).as_posix()] = _regular_file(path)
    return found


def _regular_file(path: Path) -> os.stat_result:
    """The status of a file that is neither a link nor a device, and has no second name.

    ONNX Runtime refuses weights behind a symbolic link and reads them through a hard link.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise BundleError(f"{path} is a symbolic link: put the file itself into the bundle")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a regular file: remove it from the bundle")
    if status.st_nlink > 1:
        raise BundleError(
            f"{path} is a hard link, so another name can change it: put a copy into the bundle"
        )
    return status


def _check_names_and_sizes(
    root: Path, manifest: Manifest, found: dict[str, os.stat_result]
) -> None:
    missing = sorted(manifest.files.keys() - found.keys())
    if missing:
        raise BundleError(f"the bundle {root} lacks {', '.join(missing)}: {_REBUILD}")
    extra = sorted(found.keys() - manifest.files.keys() - {MANIFEST})
    if extra:
        raise BundleError(
            f"the bundle {root} holds what its manifest doesn't name, {', '.join(extra)}: "
            "remove that"
        )
    for name, entry in manifest.files.items():
        if found[name].st_size != entry.size:
            raise BundleError(
                f"{root / name} was altered, it has {found[name].st_size:,} bytes instead of "
                f"{entry.size:,}: {_REBUILD}"
            )


def _check_hashes(root: Path, manifest: Manifest) -> None:
    total = sum(entry.size for entry in manifest.files.values())
    logger.info("checking %.0f MB of %s", total / 1e6, root)
    for name, entry in manifest.files.items():
        if _sha256(root / name) != entry.sha256:
            raise BundleError(f"{root / name} was altered, its sha256 is another: {_REBUILD}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
