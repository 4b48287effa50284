"""Remember which bundles passed a full check, so that their files needn't be hashed again.

One small JSON file in the user's cache directory, never in a bundle, maps the directory of a bundle
to a fingerprint of its files' status. It only saves time: if it can't be read or written, it isn't
used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from llama_runtime.user_cache import cache_folder

_MAX_BUNDLES = 100


def fingerprint(manifest: bytes, files: Mapping[str, os.stat_result]) -> str:
    """What changes when a file of a bundle is written, replaced, renamed or linked.

    Args:
        manifest: contents of the bundle's manifest.
        files: status of every file by name, taken before the files were hashed.
    """
    state = [
        (name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        for name, status in sorted(files.items())
    ]
    return hashlib.sha256(json.dumps(state).encode() + manifest).hexdigest()


def is_remembered(bundle: Path, state: str) -> bool:
    """Whether this bundle passed a full check in this state."""
    return _load().get(str(bundle)) == state


def remember(bundle: Path, state: str) -> None:
    """Note that a bundle passed a full check in this state."""
    path = _cache_file()
    if path is None:
        return
    known = _load()
    known.pop(str(bundle), None)  # the latest goes to the end, the oldest are forgotten
    known[str(bundle)] = state
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(dict(list(known.items())[-_MAX_BUNDLES:]), indent=1))
        unfinished.replace(path)


def _load() -> dict[str, object]:
    path = _cache_file()
    try:
        known = {} if path is None else json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _cache_file() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "verified.json"
