"""Which libraries are installed, and whether they can be imported.

Each is imported in a process of its own: one that was compiled for another processor ends the
process, and what one loads may hide that another is broken. Libraries of the exporter are only
looked up: the runtime never imports them, and ``llama-export`` says itself what is wrong.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from llama_runtime.backends.ort_library import DISTRIBUTIONS, check_installed_once
from llama_runtime.collect_env.discreet import error_text
from llama_runtime.errors import DependencyError
from llama_runtime.machine import default_threads

Facts = dict[str, object]

# Distributions, each with the module to import; those that bring one module are alternatives.
RUNTIME = {
    "numpy": "numpy",
    "tokenizers": "tokenizers",
    "click": "click",
    "llguidance": "llguidance",
    "minijinja": "minijinja",
    "prompt_toolkit": "prompt_toolkit",
    **dict.fromkeys(DISTRIBUTIONS, "onnxruntime"),
    "cuda-bindings": "cuda.bindings.driver",
    "tensorrt": "tensorrt",
    "tensorrt-rtx-cu13-bindings": "tensorrt_rtx",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "prometheus-client": "prometheus_client",
    "pyarrow": "pyarrow",
    "ray": "ray",
    "resvg-py": "resvg_py",
}
NEEDED = ("numpy", "tokenizers", "click", "llguidance", "minijinja", "prompt_toolkit")
EXPORT = ("torch", "onnx", "onnxscript", "onnx-ir", "safetensors", "gguf", "jinja2", "ml-dtypes")
SECONDS = 60.0  # for one library
MOST_AT_ONCE = 8

_PROGRAM = """
import importlib, json, sys
facts = {}
try:
    module = importlib.import_module(sys.argv[1])
    if sys.argv[1] == "onnxruntime":
        facts = {"build": module.get_build_info(), "providers": module.get_available_providers()}
        facts = {"imported": module.__version__, **facts}
except BaseException as error:
    facts = {"error": f"{type(error).__name__}: {error}"}
print("\\n" + json.dumps(facts))
"""


def libraries(seconds: float = SECONDS) -> dict[str, Facts]:
    """Every library that Caravan can use, by the name it is installed by.

    Args:
        seconds: that importing one may take.

    Returns:
        ``version``, None if it isn't installed; ``error`` if it can't be imported; of onnxruntime
        also the version ``imported``, ``build`` and ``providers``. Of onnxruntime's distributions
        those that are installed, or ``onnxruntime`` itself.
    """
    found = {name: _version(name) for name in (*RUNTIME, *EXPORT)}
    there = [name for name in RUNTIME if found[name] is not None or name in NEEDED]
    alternatives = DISTRIBUTIONS if any(n in there for n in DISTRIBUTIONS) else DISTRIBUTIONS[1:]
    twice = _installed_twice()
    with ThreadPoolExecutor(min(MOST_AT_ONCE, default_threads())) as pool:
        tried = dict(
            zip(there, pool.map(lambda n: _imported(RUNTIME[n], seconds), there), strict=True)
        )
    for name in DISTRIBUTIONS:
        if twice and name in tried:
            tried[name] = {"error": twice}
    return {
        name: {"version": version, **tried.get(name, {})}
        for name, version in found.items()
        if version is not None or name not in alternatives
    }


def _installed_twice() -> str:
    try:
        check_installed_once()
    except DependencyError as error:
        return str(error)
    return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception as error:  # damaged metadata raises whatever it wants
        return error_text(error)


def _imported(module: str, seconds: float) -> Facts:
    """What a module says when it is imported, or why it can't be."""
    command: Sequence[str] = [sys.executable, "-P", "-c", _PROGRAM, module]
    try:
        ended = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
            env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
        )
    except subprocess.TimeoutExpired:
        return {"error": f"importing {module} takes more than {seconds:g} s"}
    except OSError as error:
        return {"error": error_text(error)}
    if ended.returncode:
        return {"error": f"importing {module} ends the process with {_status(ended.returncode)}"}
    facts: Facts = json.loads(ended.stdout.splitlines()[-1])
    return {**facts, "error": error_text(str(facts["error"]))} if "error" in facts else facts


def _status(returncode: int) -> str:
    try:
        return signal.Signals(-returncode).name
    except ValueError:
        return f"status {returncode}"
