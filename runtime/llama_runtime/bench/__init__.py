"""How fast a bundle is on this machine, and how fast a server answers: ``llama-run bench``."""

from __future__ import annotations

STRATEGIES = ("sequential", "concurrent", "static", "continuous")
