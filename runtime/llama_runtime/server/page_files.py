"""The files of the page at ``/``. They hold nothing secret, so no key is asked for them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files

INDEX = "index.html"
FILES: Mapping[str, str] = {
    "/": INDEX,
    "/page/page.css": "page.css",
    "/page/page.js": "page.js",
    "/page/slots.js": "slots.js",
    "/page/charts.js": "charts.js",
    "/page/prompt.js": "prompt.js",
    "/page/text.js": "text.js",
    "/page/icon.svg": "icon.svg",
}
STATE_PATH = "/page/state"
_KINDS = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_LOCKED = b'data-locked="no"'


def read(name: str) -> bytes:
    """A file of the page."""
    return files("llama_runtime.server").joinpath("page", name).read_bytes()


def locked(page: bytes) -> bytes:
    """The page of a server that asks for keys, so that it asks its reader for one at once."""
    assert page.count(_LOCKED) == 1
    return page.replace(_LOCKED, b'data-locked="yes"')


def media_type(name: str) -> str:
    """What a file is, for its ``Content-Type``."""
    return _KINDS[name[name.rindex(".") :]]
