"""Who may ask, and from where."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from llama_runtime.errors import RequestError

MAX_KEY_FILE_BYTES = 2**20


class Keys:
    """The keys of a server, compared so that the time taken tells nothing of them.

    Args:
        keys: one of which has to be given; none for anybody.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def admit(self, authorization: bytes | None) -> bool:
        """Whether a request may pass.

        Args:
            authorization: its header of that name, or None.
        """
        if not self._digests:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        given = _digest(key.strip())
        found = False
        for digest in self._digests:  # all of them, so that no order shows
            found |= hmac.compare_digest(digest, given)
        return found and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    """Of one length for all keys, so that theirs doesn't show either."""
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and those that begin with # are none.

    Args:
        path: a file that others on this machine can't read.

    Raises:
        RequestError: it can't be read, others can read it, or it holds none.
    """
    option = "--api-key-file"
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(MAX_KEY_FILE_BYTES + 1)
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"{option}: {path} is not ASCII text", param="api_key_file") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise RequestError(
            f"{option}: {path} can't be read: {reason}", param="api_key_file"
        ) from error
    if mode & (stat.S_IROTH | stat.S_IWOTH) and stat.S_ISREG(mode):
        raise RequestError(
            f"{option}: {path} may be read by everybody on this machine: chmod o-rwx {path}",
            param="api_key_file",
        )
    if len(data) > MAX_KEY_FILE_BYTES:
        raise RequestError(
            f"{option}: {path} has over {MAX_KEY_FILE_BYTES:,} bytes", param="api_key_file"
        )
    found = (line.strip() for line in lines)
    keys = tuple(line for line in found if line and not line.startswith("#"))
    if not keys:
        raise RequestError(f"{option}: {path} holds no key: write one a line", param="api_key_file")
    for number, key in enumerate(keys, 1):
        if not key.isprintable() or " " in key:
            raise RequestError(
                f"{option}: key {number} of {path} holds a space or what doesn't print",
                param="api_key_file",
            )
    return keys


def is_loopback(host: str) -> bool:
    """Whether all addresses of a host are of this machine alone.

    Raises:
        RequestError: it has none.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"--host {host!r:.80} can't be found: {error}", param="host") from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)
