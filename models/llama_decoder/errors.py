"""What goes wrong while a checkpoint is read."""

from __future__ import annotations

from llama_runtime.errors import CaravanError


class CheckpointError(CaravanError):
    """A checkpoint can't be used: not a Llama, incomplete, misshapen or unsupported."""
