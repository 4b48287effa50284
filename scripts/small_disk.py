"""A folder for which there is little room, for scripts/prove_resume."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FIRST_ROOM, MORE_ROOM = 100_000, 60_000  # bytes at first, and what it gets when it is full


@dataclass
class SmallDisk:
    """A folder for which there is little room.

    Attributes:
        path: the folder.
        kind: a disk, or where none can be mounted, a limit of the size of files.
        limit: that limit, in bytes; None for a disk.
    """

    path: Path
    kind: str
    limit: int | None
    _room: int = FIRST_ROOM

    def grow(self) -> None:
        """Give it more room."""
        self._room += MORE_ROOM
        if self.limit is not None:
            self.limit = self._room
        else:
            options = f"remount,size={self._room}"
            subprocess.run(["mount", "-o", options, str(self.path)], check=True)


@contextmanager
def small_disk(path: Path) -> Iterator[SmallDisk]:
    """A folder with little room, until the block ends; nothing may be there."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={FIRST_ROOM}", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield SmallDisk(
            path, "full disk" if mounted else "file limit", None if mounted else FIRST_ROOM
        )
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        shutil.rmtree(path, ignore_errors=True)
