"""What goes wrong while a bundle is built."""

from __future__ import annotations

from llama_runtime.errors import CaravanError


class ExportError(CaravanError):
    """A bundle can't be built from this checkpoint, or what was built fails its checks."""
