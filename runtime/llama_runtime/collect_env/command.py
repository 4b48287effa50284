"""The command ``llama-run collect-env``: gather the facts that a bug report needs."""

from __future__ import annotations

import json
import os
import platform
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from llama_runtime import __version__
from llama_runtime.bundle import open_bundle
from llama_runtime.collect_env.discreet import error_text, variables
from llama_runtime.collect_env.hardware import Facts, gpus, memory, processors, system
from llama_runtime.collect_env.libraries import libraries
from llama_runtime.errors import CaravanError


def collect(bundle: Path | None) -> dict[str, Facts]:
    """All facts, by section.

    Args:
        bundle: one to describe too. That it can't be opened is a fact like others.
    """
    found = {
        "caravan": {"version": __version__, "python": _python()},
        "system": system(),
        "processors": processors(),
        "memory": memory(),
        "gpus": gpus(),
        "libraries": dict[str, object](libraries()),
        "environment": dict[str, object](variables(os.environ)),
    }
    return found if bundle is None else {**found, "bundle": describe_bundle(bundle)}


def describe_bundle(path: Path) -> Facts:
    """What a bundle's manifest says, or ``error``: why it can't be opened."""
    try:
        manifest = open_bundle(path).manifest
    except (CaravanError, OSError) as error:
        return {"error": error_text(str(error), str(path) if path.is_absolute() else "")}
    return {
        "name": manifest.name,
        "source": asdict(manifest.source),
        "schema": manifest.schema,
        "created_by": dict(manifest.created_by),
        "geometry": asdict(manifest.geometry),
        "graphs": {graph.dialect: graph.precision for graph in manifest.graphs},
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "verification": dict(manifest.verification),
    }


def as_json(facts: Mapping[str, Facts]) -> str:
    """The facts for programs."""
    return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"


def _python() -> str:
    words = [platform.python_implementation(), platform.python_version()]
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        words.append("without the GIL")
    if sys.prefix != sys.base_prefix:
        words.append("in a virtual environment")
    return " ".join(words)
