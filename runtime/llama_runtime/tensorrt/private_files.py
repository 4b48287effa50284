"""Files of one user, which nobody else has written: how they are made, opened and checked."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

SECRET = "secret"
_SECRET_BYTES = 32


class RefusedError(Exception):
    """Why a file isn't used."""


def find_secret(engines: Path) -> bytes | None:
    """What this user signs with; None if there is none.

    Raises:
        RefusedError: it isn't secret.
    """
    try:
        with opened(engines / SECRET, others=0o077) as file:
            secret = os.read(file, _SECRET_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(secret) != _SECRET_BYTES:
        raise RefusedError(f"{engines / SECRET} isn't a secret; delete it")
    return secret


def new_secret(engines: Path) -> bytes:
    """Make one, or find the one that another process has just made."""
    unfinished = engines / f".{SECRET}.{os.getpid()}.{secrets.token_hex(8)}"
    write_private(unfinished, secrets.token_bytes(_SECRET_BYTES))
    try:
        with contextlib.suppress(FileExistsError):
            os.link(unfinished, engines / SECRET)  # which, other than renaming, replaces nothing
    finally:
        unfinished.unlink()
    secret = find_secret(engines)
    if secret is None:
        raise RefusedError(f"{engines / SECRET} can't be made")
    return secret


@contextlib.contextmanager
def opened(path: Path, others: int = 0o022) -> Iterator[int]:
    """A file of this user, open; not what a link leads to."""
    # Opening a pipe would wait for who writes into it.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if path.is_symlink():  # for systems without the flag, and a better message
        raise RefusedError(f"{path.name} is a link")
    file = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        check_status(os.fstat(file), stat.S_ISREG, path.name, others)
        yield file
    finally:
        os.close(file)


def check_status(
    status: os.stat_result, is_kind: Callable[[int], bool], name: str, others: int = 0o022
) -> None:
    """Refuse what isn't of the right kind and the user's own."""
    if not is_kind(status.st_mode):
        raise RefusedError(f"{name} is a link or of a wrong kind")
    if hasattr(os, "getuid"):  # elsewhere the folder of the user is private
        if status.st_uid != os.getuid():
            raise RefusedError(f"{name} belongs to another user")
        if status.st_mode & others:
            raise RefusedError(f"others may open {name}, whose mode is {status.st_mode & 0o777:o}")


def make_private(folder: Path) -> None:
    """Make a folder that is the user's own, or make sure that it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_status(folder.lstat(), stat.S_ISDIR, folder.name)


def write_private(path: Path, content: bytes | memoryview) -> None:
    """Write a new file that nobody else can read."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    with open(file, "wb", buffering=0) as stream:
        rest = memoryview(content)
        while rest:  # one call writes 2 GiB at most
            rest = rest[stream.write(rest) :]
