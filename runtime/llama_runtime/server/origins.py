"""Whose pages in a browser may ask a server that has no keys.

A browser sends what any page tells it to, also to a server on the loopback. So without a key two
things are looked at: the name that the server is asked by, since the owner of a name can have it
point to the loopback after the page has come from elsewhere; and where a page comes from that sends
something.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence

from llama_runtime.server.failures import StatusError

_AUTHORITY = re.compile(r"(?:\[([^\[\]]*)\]|([^\[\]:@]*))(?::[0-9]*)?")


def host_of(authority: str) -> str:
    """The host of a ``Host`` header in lower case, without its port and the brackets of IPv6.

    Empty if the header can't be read.
    """
    found = _AUTHORITY.fullmatch(authority)
    return "" if found is None else (found[1] or found[2]).rstrip(".").lower()


def loopback_names(host: str) -> tuple[str, ...]:
    """What a server that listens on the loopback may be asked by, beside addresses.

    Args:
        host: where it listens, as it was told.
    """
    return "localhost", host_of(f"[{host}]" if ":" in host else host)


class Origins:
    """Refuses what a page of somebody else sends.

    Args:
        has_keys: whether requests need a key, which such a page doesn't have: then all pass.
        names: that the server may be asked by, beside addresses of the loopback; None for any.
    """

    def __init__(self, has_keys: bool, names: Sequence[str] | None) -> None:
        self._has_keys = has_keys
        self._names = None if names is None else frozenset(map(str.lower, names))

    def check(self, method: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuse a request.

        Args:
            method: of HTTP.
            headers: by their names in lower case.

        Raises:
            StatusError: it has another name in ``Host``, or would change something and comes from
                a page of another origin.
        """
        if self._has_keys:
            return
        host = headers.get(b"host", b"").decode("latin-1")
        if self._names is not None and not self._is_ours(host_of(host)):
            raise StatusError(
                400,
                f"the Host header names {host!r:.80}, which isn't this server: ask it as "
                "localhost, or have it ask for keys",
                param="host",
            )
        origin = headers.get(b"origin")
        if origin is None or method in ("GET", "HEAD"):
            return
        if origin.decode("latin-1").partition("://")[2].lower() != host.lower():
            raise StatusError(
                403,
                "a page of another origin can't ask a server without keys: start it with "
                "--api-key-file, and ask with a key",
                code="cross_origin",
                param="origin",
            )

    def _is_ours(self, host: str) -> bool:
        assert self._names is not None
        if host and host in self._names:
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False
