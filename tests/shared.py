"""What the processes share that run the tests side by side: folders that take long to make."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path


class Shared:
    """Folders that tests of several processes read: the first that asks for one makes it.

    Args:
        folder: an existing one, in which they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of a name, which nobody gives to other contents.

        Args:
            name: of a file.
            make: is called with the path of the folder, at which there is nothing. Where it fails,
                it is called again for the next who asks.
        """
        path, made = self._folder / name, self._folder / f"{name}.made"
        with (self._folder / f"{name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not made.exists():
                shutil.rmtree(path, ignore_errors=True)  # what one that failed has left
                make(path)
                made.touch()
        return path
