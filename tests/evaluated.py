"""Bundles with a reference, over short texts that tests make up."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llama_runtime.bundle import Manifest, describe_files, write_manifest
from llama_runtime.bundle_limits import REFERENCE_LOGPROBS

SHA256 = "5" * 64


@dataclass(frozen=True)
class Text:
    kind: str
    text: str


TEXTS = (
    Text("prose", "It was the llama, not the shepherd, who knew the way across the pass. " * 9),
    Text("code", "def llama(number: int) -> str:\n    return 'llama' * number\n" * 8),
    Text("prose", "Whoever has seen it snow in June will not forget the sound of it. " * 5),
)


def stand_in_texts(monkeypatch: pytest.MonkeyPatch, sha256: str = SHA256) -> None:
    """The texts above in place of those of the package."""
    module: Any = ModuleType("llama_runtime.evaluation.texts")
    module.evaluation_texts = lambda: TEXTS
    module.texts_sha256 = lambda: sha256
    monkeypatch.setitem(sys.modules, module.__name__, module)


def with_reference(
    bundle: Path, output: Path, weights: Iterable[tuple[str, Any]], **options: Any
) -> Path:
    """A copy of a bundle of the tiny model, measured against a model of these weights."""
    from llama_decoder.tiny import tiny_config
    from llama_export.quality import cut_windows, reference_logprobs
    from llama_runtime.tokenizer import Tokenizer

    shutil.copytree(bundle, output)
    windows = cut_windows(Tokenizer(output / "tokenizer.json"), TEXTS, tiny_config().max_positions)
    reference = reference_logprobs(tiny_config(), weights, windows, SHA256, **options)
    (output / REFERENCE_LOGPROBS).write_bytes(reference.to_bytes())
    rewrite_manifest(output)
    return output


def rewrite_manifest(bundle: Path, **changes: Any) -> None:
    """Make the manifest fit the files, and change some of its fields."""
    manifest = Manifest.from_json((bundle / "manifest.json").read_bytes())
    write_manifest(bundle, replace(manifest, files=describe_files(bundle), **changes))
