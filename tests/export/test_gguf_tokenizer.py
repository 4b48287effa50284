"""The tokenizer of the real GGUF file, against llama.cpp and what Llama 3 publishes.

scripts/make_token_fixture.py wrote tests/data/llama_cpp_tokens.json.gz and says what is in it.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from llama_export.gguf_tokenizer import read_gguf_tokenizer

FIXTURE = Path(__file__).parents[1] / "data" / "llama_cpp_tokens.json.gz"
CASES = ("smollm", "llama-bpe", "gpt-2", "qwen2", "default", "sentencepiece")
LLAMA3_WORDS = (  # as published with Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

Metadata = dict[str, Any]


@pytest.fixture(scope="module")
def fixture() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(gzip.decompress(FIXTURE.read_bytes()))
    return loaded


@pytest.fixture(scope="module")
def real_metadata(real_gguf: Path) -> Metadata:
    return {key: field.contents() for key, field in gguf.GGUFReader(real_gguf).fields.items()}


def build(metadata: Metadata) -> Tokenizer:
    return Tokenizer.from_buffer(read_gguf_tokenizer(metadata).tokenizer_json)


def test_the_fixture_holds_what_it_is_said_to(fixture: dict[str, Any]) -> None:
    assert len(set(fixture["texts"])) == len(fixture["texts"]) >= 2000
    assert "" in fixture["texts"]
    assert set(fixture["cases"]) == set(CASES)
    assert len(fixture["cases"]["smollm"]["parsed"]) == len(fixture["texts"])
    assert sum(ids is not None for ids in fixture["cases"]["smollm"]["plain"]) >= 100


@pytest.mark.parametrize("name", CASES)
def test_every_id_and_end_id_is_llama_cpps(
    name: str, fixture: dict[str, Any], real_metadata: Metadata
) -> None:
    case = fixture["cases"][name]
    metadata = case["metadata"] if name == "sentencepiece" else real_metadata | case["metadata"]
    source = read_gguf_tokenizer(metadata)
    ends = source.generation_config["eos_token_id"]
    assert isinstance(ends, list)
    assert sorted(ends) == case["end_ids"]
    tokenizer = Tokenizer.from_buffer(source.tokenizer_json)
    parsed = case["parsed"]
    plain = [b if a is None else a for a, b in zip(case["plain"], parsed, strict=True)]
    texts = fixture["texts"][: len(parsed)]
    for as_text, wanted in ((False, parsed), (True, plain)):
        tokenizer.encode_special_tokens = as_text
        found = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        wrong = [t for t, a, b in zip(texts, found, wanted, strict=True) if a != b]
        assert not wrong, f"{len(wrong)} texts differ; special tokens as text: {as_text}"


def test_ids_become_the_text_again(fixture: dict[str, Any], real_metadata: Metadata) -> None:
    tokenizer = build(real_metadata)
    known = set(real_metadata["tokenizer.ggml.tokens"])
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [
        t for t in fixture["texts"] if {c for w, _ in cut.pre_tokenize_str(t) for c in w} <= known
    ]
    assert len(texts) > 3000
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_sentencepiece_ids_become_the_text_again(fixture: dict[str, Any]) -> None:
    tokenizer = build(fixture["cases"]["sentencepiece"]["metadata"])
    tokenizer.encode_special_tokens = True
    texts = [t for t in fixture["texts"] if "<tool>" not in t]  # text after it starts with a space
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_what_the_real_model_says_of_itself(real_metadata: Metadata) -> None:
    source = read_gguf_tokenizer(real_metadata)
    assert source.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 0, 4]}
    assert source.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert source.chat_template == real_metadata["tokenizer.chat_template"]


def test_llama_3_words_are_cut_as_published(fixture: dict[str, Any]) -> None:
    published = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    ours = build(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": pre_tokenizers.ByteLevel.alphabet(),
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.add_bos_token": False,
        }
    ).pre_tokenizer
    for text in fixture["texts"]:
        assert ours.pre_tokenize_str(text) == published.pre_tokenize_str(text)
