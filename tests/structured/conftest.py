"""The real vocabulary, without the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_decoder.gguf_file import GgufWeights
from llama_export.gguf_tokenizer import read_gguf_tokenizer
from tests.structured.walks import Walker


@pytest.fixture(scope="session")
def real_tokenizer(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    path.write_bytes(read_gguf_tokenizer(GgufWeights(real_gguf).metadata).tokenizer_json)
    return path


@pytest.fixture(scope="session")
def walker(real_tokenizer: Path) -> Walker:
    return Walker(real_tokenizer, vocab_size=49_152, eos_token_id=2)
