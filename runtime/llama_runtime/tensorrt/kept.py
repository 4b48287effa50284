"""What TensorRT has found out and would find out again, kept for the next time.

TensorRT measures kernels when it builds; TensorRT-RTX compiles kernels when an engine is first run.
Both read what is kept, and run it, so it is signed as engines are; what doesn't verify is left
aside. Whether it fits the GPU and its driver they check themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import stat
from pathlib import Path
from typing import Literal

from llama_runtime.tensorrt.library import Library
from llama_runtime.tensorrt.private_files import (
    RefusedError,
    check_status,
    find_secret,
    make_private,
    new_secret,
    opened,
    write_private,
)
from llama_runtime.user_cache import cache_folder

Kind = Literal["timing", "runtime"]

MAX_BYTES = 2**28
_SIGNATURE_BYTES = 32

logger = logging.getLogger(__name__)


def load_kept(kind: Kind, library: Library, device: str) -> bytes:
    """What a library has kept of a GPU; empty if there is nothing to be trusted.

    Args:
        kind: ``timing`` of kernels while building, or ``runtime``: kernels, compiled.
        library: what made it; that of another version is another.
        device: name and compute capability of the GPU.
    """
    path = _path(kind, library, device)
    if path is None or not os.path.lexists(path):
        return b""
    try:
        check_status(path.parent.lstat(), stat.S_ISDIR, path.parent.name)
        secret = find_secret(path.parent)
        with opened(path) as file:
            size = os.fstat(file).st_size
            content = os.read(file, size) if size <= MAX_BYTES else b""
    except (RefusedError, OSError) as error:
        logger.warning("%s isn't used: %s", path, error)
        return b""
    signature, found = content[:_SIGNATURE_BYTES], content[_SIGNATURE_BYTES:]
    if secret is None or not hmac.compare_digest(signature, _sign(secret, path.name, found)):
        logger.warning("%s isn't used: it wasn't signed here", path)
        return b""
    return found


def store_kept(kind: Kind, library: Library, device: str, found: bytes) -> None:
    """Keep it in place of the earlier one, which it holds; nothing, if it can't be kept."""
    path = _path(kind, library, device)
    if path is None or not found or len(found) + _SIGNATURE_BYTES > MAX_BYTES:
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}")
    try:
        make_private(path.parent)
        secret = find_secret(path.parent) or new_secret(path.parent)
        try:
            write_private(unfinished, _sign(secret, path.name, found) + found)
            unfinished.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()
    except (RefusedError, OSError) as error:
        logger.warning("%s can't be written: %s", path, error)


def _path(kind: Kind, library: Library, device: str) -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    name = hashlib.sha256("\0".join((library.name, library.version, device)).encode()).hexdigest()
    return folder / "engines" / f"{kind}-{name}"


def _sign(secret: bytes, name: str, found: bytes) -> bytes:
    return hmac.new(secret, name.encode() + b"\0" + found, hashlib.sha256).digest()
