"""A model for tests that need one on disk: random weights, a byte tokenizer, a chat template."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def byte_level_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level tokenizer without merges: ids 0 to 2 are <unk>, <s>, </s>, then 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def write_tiny_model(directory: Path) -> None:
    """Write a Hugging Face directory of the tiny configuration into an existing folder."""
    from llama_decoder.tiny import tiny_config, write_huggingface

    write_huggingface(tiny_config(), directory, seed=0)
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def build_tiny_bundle(folder: Path) -> Path:
    """Write the tiny model into an existing folder, and have ``llama-export build`` its bundle."""
    model, bundle = folder / "model", folder / "bundle"
    model.mkdir()
    write_tiny_model(model)
    command = ["llama_export", "build", str(model), "--output", str(bundle), "--quiet"]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
    return bundle
