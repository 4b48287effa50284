"""Fixtures that several packages share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REAL_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The real model that `scripts/install` fetches."""
    path = Path(os.environ.get("LLAMA_EXPORT_MODEL", ROOT / "artifacts" / REAL_GGUF))
    if not path.is_file():
        pytest.fail(f"{path} is missing: run scripts/install, which fetches it")
    return path
