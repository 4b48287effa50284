"""What is read from a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from llama_export.errors import ExportError
from llama_export.source_tokenizer import read_huggingface_tokenizer

VOCABULARY = {"<s>": 0, "</s>": 1, "<|eot|>": 2, "a": 3}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory with no more than the one file that is needed."""
    Tokenizer(models.BPE(VOCABULARY, [])).save(str(tmp_path / "tokenizer.json"), pretty=True)
    return tmp_path


def write(directory: Path, name: str, value: Any) -> None:
    (directory / name).write_text(json.dumps(value), encoding="utf-8")


def test_tokenizer_json_is_copied_byte_for_byte(directory: Path) -> None:
    path = directory / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n\n  ")
    source = read_huggingface_tokenizer(directory)
    assert source.tokenizer_json == path.read_bytes()
    assert source.generation_config == {"eos_token_id": []}
    assert source.chat_template is None
    assert source.special_tokens == {}


def test_end_ids_of_every_file_come_once_in_one_list(directory: Path) -> None:
    write(directory, "generation_config.json", {"eos_token_id": [2, 7]})
    write(directory, "config.json", {"eos_token_id": 7, "bos_token_id": 0})
    write(directory, "tokenizer_config.json", {"eos_token": "</s>", "bos_token": "a"})
    source = read_huggingface_tokenizer(directory)
    assert source.generation_config == {"bos_token_id": 0, "eos_token_id": [2, 7, 1]}


def test_what_the_model_publishes_on_sampling_is_kept(directory: Path) -> None:
    published = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 0}
    write(directory, "generation_config.json", published)
    write(directory, "config.json", {"eos_token_id": None, "bos_token_id": 3})
    source = read_huggingface_tokenizer(directory)
    assert source.generation_config == published | {"eos_token_id": []}


def test_special_tokens_are_texts_in_either_spelling_and_the_configuration_wins(
    directory: Path,
) -> None:
    write(
        directory,
        "tokenizer_config.json",
        {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "pad_token": None},
    )
    write(
        directory,
        "special_tokens_map.json",
        {"eos_token": "a", "unk_token": {"content": "<unk>"}, "mask_token": "<mask>"},
    )
    assert read_huggingface_tokenizer(directory).special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }


@pytest.mark.parametrize(
    "template",
    [
        "in the configuration",
        [
            {"name": "tool_use", "template": "other"},
            {"name": "default", "template": "in the configuration"},
        ],
    ],
)
def test_the_chat_template_is_the_file_else_the_configurations_default(
    directory: Path, template: object
) -> None:
    write(directory, "tokenizer_config.json", {"chat_template": template})
    assert read_huggingface_tokenizer(directory).chat_template == "in the configuration"
    (directory / "chat_template.jinja").write_text("in a file: é", encoding="utf-8")
    assert read_huggingface_tokenizer(directory).chat_template == "in a file: é"


def test_a_directory_without_tokenizer_json_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no tokenizer.json: .*save_pretrained"):
        read_huggingface_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not a usable tokenizer: "),
        ("tokenizer.json", "", "tokenizer.json is not a usable tokenizer: "),
        ("tokenizer.json", '{"normalizer": {"type": "Precompiled"}}', "usable tokenizer: .*Precom"),
        ("config.json", "{", "config.json is not JSON: "),
        ("config.json", '{"a":' + "[" * 100_000, "config.json is not JSON: "),
        ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "half of a surrogate pair"),
        ("config.json", "[1]", r"config.json holds \[1\]; it must hold a JSON object"),
        ("config.json", '{"eos_token_id": "2"}', r"eos_token_id in .*config.json is '2'; it must"),
        ("generation_config.json", '{"eos_token_id": [true]}', r"eos_token_id in .* is \[True\]"),
        ("tokenizer_config.json", '{"chat_template": 1}', "chat_template in .* is 1; it must be"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}', "without one named 'def"),
    ],
)
def test_a_file_that_holds_something_else_is_refused_by_name(
    directory: Path, name: str, content: str, message: str
) -> None:
    (directory / name).write_text(content, encoding="utf-8")
    with pytest.raises(ExportError, match=message):
        read_huggingface_tokenizer(directory)


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja"])
def test_a_text_file_that_is_not_utf_8_is_refused_by_name(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExportError, match=f"{name} is not UTF-8"):
        read_huggingface_tokenizer(directory)
