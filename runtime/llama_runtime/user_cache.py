"""Where what only saves time is kept: the user's cache directory, never a bundle."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Caravan's folder there, which need not exist; None where there can be none."""
    if sys.platform == "win32":
        folder = os.environ.get("LOCALAPPDATA", "")
    else:
        folder = os.environ.get("XDG_CACHE_HOME", "")
        if not os.path.isabs(folder):  # as the XDG specification asks
            folder = os.path.expanduser("~/.cache")
    return Path(folder, "llama-caravan") if os.path.isabs(folder) else None
