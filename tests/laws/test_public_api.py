"""The public names of the runtime: exactly these, each imported when it is asked for."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import llama_runtime

PUBLIC = [
    "LLM",
    "AsyncLLM",
    "AsyncStream",
    "BackendError",
    "BatchDecision",
    "BundleError",
    "CapacityError",
    "CaravanError",
    "Completion",
    "DeadlineError",
    "DependencyError",
    "Engine",
    "Loaded",
    "MemoryPlan",
    "QueueFullError",
    "Request",
    "RequestError",
    "SamplingParams",
    "Settings",
    "Stats",
    "TokenEvent",
    "TokenLogprob",
    "__version__",
    "load",
    "open_bundle",
]


def test_the_public_names_are_exactly_these() -> None:
    assert llama_runtime.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_imports_and_shows(name: str) -> None:
    value = getattr(llama_runtime, name)
    assert name in dir(llama_runtime)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("llama_runtime.")
        assert value.__doc__
        assert getattr(importlib.import_module(value.__module__), name) is value


def test_all_of_them_come_with_a_star() -> None:
    names: dict[str, object] = {}
    exec("from llama_runtime import *", names)
    assert set(PUBLIC) <= names.keys()


def test_any_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'llama_runtime' has no attribute 'LLMs'"):
        llama_runtime.LLMs  # noqa: B018 - the access is the test


def test_names_show_before_anything_was_imported() -> None:
    script = f"import llama_runtime; assert set({PUBLIC}) <= set(dir(llama_runtime))"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_version_is_a_literal_for_the_build_to_read() -> None:
    assert llama_runtime.__file__ is not None
    source = Path(llama_runtime.__file__).read_text()
    versions = re.findall(r'^__version__ = "(\d+\.\d+\.\d+\S*)"$', source, re.MULTILINE)
    assert versions == [llama_runtime.__version__]
