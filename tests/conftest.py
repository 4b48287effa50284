"""Fixtures that several packages share.

What needs torch is imported where it is used: the runtime's own tests start without it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import hypothesis
import pytest
import tokenizers

from tests.tiny_model import byte_level_tokenizer, write_tiny_model

ROOT = Path(__file__).parents[1]
REAL_GGUF = ROOT / "artifacts" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# The same examples in every run, on machines of any speed, and no folder of past ones.
hypothesis.settings.register_profile("caravan", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("caravan")

# A shell's background job ignores Ctrl-C, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what the runtime remembers about bundles out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The real model that scripts/install fetches."""
    path = Path(os.environ.get("LLAMA_EXPORT_MODEL", REAL_GGUF))
    if not path.is_file():
        pytest.fail(f"{path} is missing: run scripts/fetch_model.py")
    return path


@pytest.fixture(scope="session")
def real_bundle(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the real model. Read it only: a change of a file would hurt other tests."""
    from llama_export.build import build_bundle

    output = tmp_path_factory.mktemp("real") / "bundle"
    build_bundle(real_gguf, output)
    return output


@pytest.fixture(scope="session")
def byte_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level tokenizer without merges: ids 0 to 2 are <unk>, <s>, </s>, then 256 bytes."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a Llama of random weights, the byte tokenizer, a template."""
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_model(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny model. Read it only."""
    from llama_export.build import build_bundle

    output = tmp_path_factory.mktemp("tiny-bundle") / "bundle"
    build_bundle(tiny_model, output)
    return output
