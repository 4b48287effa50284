"""A folder that takes its place when it is whole, and of which nothing stays if it never is.

The folder is made beside the output, under a name that says so, and locked while somebody works on
it. If that somebody is killed, the next build finds the folder without its lock and removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llama_runtime.interrupts import Held

FRESH_SECONDS = 1.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' renameat2

_unfinished: set[Path] = set()


@contextlib.contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A folder beside the output that replaces it if nothing goes wrong, else goes away.

    Args:
        output: absent, or a directory that may be replaced; its parents are made.

    Yields:
        The folder to fill.

    Raises:
        OSError: the system refuses.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}.building-"
    _remove_abandoned(output.parent, prefix)
    building = output.parent / f"{prefix}{secrets.token_hex(4)}"
    _unfinished.add(building)
    try:
        building.mkdir(mode=0o700)
        with _locked(building):
            yield building
            building.chmod(0o755)  # now others may read it
            _take_place(building, output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        _unfinished.discard(building)


def remove_unfinished() -> None:
    """Remove what this process was still working on. For one that is about to end."""
    for building in list(_unfinished):
        shutil.rmtree(building, ignore_errors=True)


def _take_place(building: Path, output: Path) -> None:
    """Rename, so that at no moment the output is missing; what was there comes to ``building``."""
    if not output.exists():
        building.rename(output)
    elif not _exchange(building, output):
        # Where a system has no exchange, a kill right here leaves the old output under this name.
        replaced = output.with_name(f".{output.name}.old-{secrets.token_hex(4)}")
        with Held():
            output.rename(replaced)
            try:
                building.rename(output)
            except OSError:
                replaced.rename(output)
                raise
        shutil.rmtree(replaced)


def _exchange(first: Path, second: Path) -> bool:
    """Give each of two paths the other's name, at once; False where the system can't."""
    if sys.platform == "linux":
        names = (os.fsencode(first), os.fsencode(second))
        try:
            renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        except (OSError, AttributeError):
            return False
        done: int = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
        return done == 0
    else:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back when the process ends."""
    if sys.platform == "win32":
        yield
    else:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(descriptor)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders of builds that were killed: those that nobody holds."""
    if sys.platform != "win32":
        import fcntl

        for folder in parent.glob(f"{glob.escape(prefix)}*"):
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    if time.time() - os.fstat(descriptor).st_mtime < FRESH_SECONDS:
                        continue  # somebody may have made it and not locked it yet
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                finally:
                    os.close(descriptor)
