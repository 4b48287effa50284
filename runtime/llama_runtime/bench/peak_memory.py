"""The most memory that this process has held since a moment."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset() -> None:
    """Begin anew, where the system can: Linux. Elsewhere the peak is that of the whole process."""
    with suppress(OSError):
        _RESET.write_text("5")


def peak_bytes() -> int | None:
    """Bytes resident at the most, pages of mapped files among them; None where nobody knows."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return _most()


if sys.platform == "win32":

    def _most() -> int | None:
        return None

else:
    import resource

    def _most() -> int | None:
        """Of the whole process; macOS counts bytes, other systems KiB."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else 1024 * most
