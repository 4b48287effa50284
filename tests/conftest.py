"""Fixtures that several packages share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import hypothesis
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from llama_decoder.tiny import tiny_config, write_huggingface
from llama_export.build import build_bundle

ROOT = Path(__file__).parents[1]
REAL_GGUF = ROOT / "artifacts" / "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
# The same examples in every run, on machines of any speed, and no folder of past ones.
hypothesis.settings.register_profile("caravan", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("caravan")


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
    output = tmp_path_factory.mktemp("real") / "bundle"
    build_bundle(real_gguf, output)
    return output


@pytest.fixture(scope="session")
def byte_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level tokenizer without merges: ids 0 to 2 are <unk>, <s>, </s>, then 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(
    byte_tokenizer: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A Hugging Face directory: a Llama of random weights, the byte tokenizer, a template."""
    directory = tmp_path_factory.mktemp("tiny")
    write_huggingface(tiny_config(), directory, seed=0)
    byte_tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny model. Read it only."""
    output = tmp_path_factory.mktemp("tiny-bundle") / "bundle"
    build_bundle(tiny_model, output)
    return output
