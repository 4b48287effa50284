"""What TensorRT has measured of kernels, kept for the next build of a similar graph.

TensorRT-RTX measures nothing when it builds and has none. TensorRT parses what is kept, so that is
signed as engines are; what doesn't verify is left aside.
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

MAX_BYTES = 2**28
_SIGNATURE_BYTES = 32

logger = logging.getLogger(__name__)


def load_timing(library: Library, device: str) -> bytes:
    """The measurements of a library on a GPU; empty if there are none to be trusted.

    Args:
        library: what made them; those of another version are others.
        device: name and compute capability of the GPU.
    """
    path = _path(library, device)
    if path is None or not os.path.lexists(path):
        return b""
    try:
        check_status(path.parent.lstat(), stat.S_ISDIR, path.parent.name)
        secret = find_secret(path.parent)
        with opened(path) as file:
            size = os.fstat(file).st_size
            content = os.read(file, size) if size <= MAX_BYTES else b""
    except (RefusedError, OSError) as error:
        logger.warning("the timing cache %s isn't used: %s", path, error)
        return b""
    signature, measured = content[:_SIGNATURE_BYTES], content[_SIGNATURE_BYTES:]
    if secret is None or not hmac.compare_digest(signature, _sign(secret, path.name, measured)):
        logger.warning("the timing cache %s isn't used: it wasn't signed here", path)
        return b""
    return measured


def store_timing(library: Library, device: str, measured: bytes) -> None:
    """Keep them in place of the earlier ones, which they hold; nothing, if they can't be kept."""
    path = _path(library, device)
    if path is None or not measured or len(measured) + _SIGNATURE_BYTES > MAX_BYTES:
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}")
    try:
        make_private(path.parent)
        secret = find_secret(path.parent) or new_secret(path.parent)
        try:
            write_private(unfinished, _sign(secret, path.name, measured) + measured)
            unfinished.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()
    except (RefusedError, OSError) as error:
        logger.warning("the timing cache can't be kept in %s: %s", path, error)


def _path(library: Library, device: str) -> Path | None:
    folder = cache_folder()
    if folder is None or library.builds_ahead:
        return None
    name = hashlib.sha256("\0".join((library.name, library.version, device)).encode()).hexdigest()
    return folder / "engines" / f"timing-{name}"


def _sign(secret: bytes, name: str, measured: bytes) -> bytes:
    return hmac.new(secret, name.encode() + b"\0" + measured, hashlib.sha256).digest()
