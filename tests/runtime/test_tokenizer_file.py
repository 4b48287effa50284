"""The look at a tokenizer before the ``tokenizers`` library."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llama_runtime.errors import BundleError, RequestError
from llama_runtime.tokenizer import Tokenizer
from llama_runtime.tokenizer_file import find_problem

# More of what is refused is in tests/hostile/bundles.py.

SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}


@pytest.fixture
def document(byte_tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(byte_tokenizer.to_str())
    return parsed


def problem(document: dict[str, Any], **sections: Any) -> str | None:
    changed = {**copy.deepcopy(document), **sections}
    return find_problem(json.dumps(changed).encode())


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def surround(*pieces: dict[str, Any], count: int = 1) -> dict[str, Any]:
    special = {"<s>": {"id": "<s>", "ids": [1] * count, "tokens": ["<s>"] * count}}
    return {"type": "TemplateProcessing", "single": pieces, "special_tokens": special}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"normalizer": {"type": "NFC"}},
        {  # Llama 2
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace("▁", String=" ")],
            }
        },
        {"normalizer": replace(" ", Regex=" {2,}")},
        {  # Llama 3
            "post_processor": {
                "type": "Sequence",
                "processors": [{"type": "ByteLevel"}, surround(BOS, TEXT)],
            }
        },
        {"pre_tokenizer": {**SPLIT, "pattern": {"Regex": r"\p{N}{1,3}"}}},
        {"model": {"vocab": {"a": 0}, "merges": []}},  # older files don't say what it is
    ],
)
def test_what_llamas_have_is_taken(document: dict[str, Any], sections: dict[str, Any]) -> None:
    assert problem(document, **sections) is None


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"normalizer": replace("a" * 65, String="b")}, "up to 65 characters of one"),
        ({"normalizer": replace("a" * 64, Regex="")}, "up to 65 characters of one"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 65}}, "prepends more than 64"),
        ({"normalizer": {"type": "Precompiled"}}, "of the kind 'Precompiled'"),
        ({"normalizer": {"prepend": "x"}}, "not what it should be ('type')"),
        ({"normalizer": 3}, "not what it should be"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}] * 65}},
            "65 steps; 64 is the limit",
        ),
        ({"post_processor": surround(BOS)}, "the text 0 times"),
        ({"post_processor": surround(TEXT, TEXT)}, "the text 2 times"),
        ({"post_processor": surround(BOS, TEXT, count=65)}, "and 65 tokens"),
        (
            {"post_processor": {"type": "Sequence", "processors": [surround(TEXT)] * 2}},
            "more than one template",
        ),
        ({"model": {"type": "Unigram", "unk_id": None, "vocab": []}}, "no unk_id"),
        ({"model": {"type": "BPE", "vocab": {"a": 1033}, "merges": []}}, "it may be 1,032 at most"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "end_of_word_suffix '</w>'"),
        ({"added_tokens": [{"id": 1, "content": "x" * 513}]}, "1 to 512 characters"),
    ],
)
def test_what_could_do_harm_is_named(
    document: dict[str, Any], sections: dict[str, Any], words: str
) -> None:
    found = problem(document, **sections)
    assert found is not None
    assert words in found
    assert "\n" not in found


def test_a_key_that_comes_twice_is_refused(document: dict[str, Any]) -> None:
    data = json.dumps(document).replace('{"version"', '{"normalizer": null, "version"', 1)
    assert "the same key twice" in str(find_problem(data.encode()))


def test_a_panic_of_the_library_is_an_error_of_the_request(
    document: dict[str, Any], tmp_path: Path
) -> None:
    """Rust's panics derive from BaseException. This expression tries 2^40 ways, and is given up."""
    path = tmp_path / "tokenizer.json"
    document["pre_tokenizer"] = {**SPLIT, "pattern": {"Regex": "(a+)+$"}}
    path.write_text(json.dumps(document))
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("ab") == tokenizer.encode("ab")
    for encode in (tokenizer.encode, tokenizer.encode_templated):
        with pytest.raises(RequestError, match=r"the tokenizer can't encode the .*retry-limit"):
            encode("a" * 40 + "!")


def test_a_panic_while_it_is_read_is_an_error_of_the_bundle(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    class Panics:
        @staticmethod
        def from_buffer(_: bytes) -> None:
            raise PanicException("index out of bounds")

    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    monkeypatch.setattr(tokenizers, "Tokenizer", Panics)
    with pytest.raises(BundleError, match="can't be read as a tokenizer: index out of bounds"):
        Tokenizer(path)
