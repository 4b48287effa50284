"""Prompts become token ids: opening tokens once, nothing cut, padded or guessed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llama_runtime.errors import BundleError, RequestError
from llama_runtime.tokenizer import Tokenizer

BOS, EOS, HEADER = 256, 257, 258


def save(path: Path, change: Callable[[Backend], object] = lambda _: None) -> Path:
    """A byte-level tokenizer of 256 bytes and three special tokens, without opening tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: rank for rank, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<bos>", "<eos>", "<header>")]
    )
    change(backend)
    backend.save(str(path))
    return path


def opening(template: str) -> Callable[[Backend], None]:
    def change(backend: Backend) -> None:
        backend.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[("<bos>", BOS), ("<eos>", EOS), ("<header>", HEADER)],
        )

    return change


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_templated(text)


def test_without_post_processor_nothing_is_added(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("ab") == letters(tokenizer, "ab")
    assert tokenizer.encode("") == []
    assert tokenizer.encode("<bos><bos>") == [BOS, BOS]


def test_a_raw_prompt_opens_with_bos_exactly_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json", opening("<bos> $A")))
    ab = letters(tokenizer, "ab")
    assert tokenizer.encode("ab") == [BOS, *ab]
    assert tokenizer.encode("<bos>ab") == [BOS, *ab]
    assert tokenizer.encode("<bos><bos>ab") == [BOS, BOS, *ab]
    assert tokenizer.encode("ab<bos>") == [BOS, *ab, BOS]
    assert tokenizer.encode("<eos>ab") == [BOS, EOS, *ab]
    assert tokenizer.encode("") == [BOS]
    assert tokenizer.encode("<bos>") == [BOS]


def test_several_opening_tokens_and_closing_ones_stay(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json", opening("<bos> <header> $A <eos>")))
    a = letters(tokenizer, "a")
    assert tokenizer.encode("a") == [BOS, HEADER, *a, EOS]
    assert tokenizer.encode("<bos><header>a") == [BOS, HEADER, *a, EOS]
    assert tokenizer.encode("<bos>a") == [BOS, HEADER, BOS, *a, EOS]


def test_a_templated_prompt_gets_no_opening_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json", opening("<bos> $A")))
    assert tokenizer.encode_templated("<bos><header>") == [BOS, HEADER]
    assert BOS not in tokenizer.encode_templated("a")
    assert tokenizer.encode_templated("") == []


def test_a_batch_is_each_prompt_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json", opening("<bos> $A")))
    texts = ["", "a", "<bos>a", "été 🎉", "a\nb\r\n\0"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_prompts_are_never_cut_or_padded(tmp_path: Path) -> None:
    def cut_and_pad(backend: Backend) -> None:
        backend.enable_truncation(4)
        backend.enable_padding(length=8)

    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json", cut_and_pad))
    assert len(tokenizer.encode("a" * 10)) == 10
    assert len(tokenizer.encode("a")) == 1
    assert [len(ids) for ids in tokenizer.encode_batch(["a" * 10, "a"])] == [10, 1]


def test_decode_undoes_encode_and_skips_special_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json", opening("<bos> $A")))
    text = " été 🎉 \u200d\r\n\0"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([BOS, *letters(tokenizer, "é")[:1], EOS]) == "\ufffd"
    assert tokenizer.decode([EOS, 10**6, -1]) == ""
    assert tokenizer.token_bytes(EOS) == b""
    assert [tokenizer.token_bytes(one) for one in letters(tokenizer, "é")] == [b"\xc3", b"\xa9"]
    assert tokenizer.vocab_size == 259


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "🎉"[:1] + "\ud83c"])
def test_a_lone_surrogate_is_a_request_error(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json"))
    with pytest.raises(RequestError, match=r"lone surrogate, U\+D") as caught:
        tokenizer.encode(text)
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match=r"prompt 1 holds a lone surrogate") as caught:
        tokenizer.encode_batch(["fine", text])
    assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match=r"lone surrogate") as caught:
        tokenizer.encode_templated(text)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("text", [None, 3, b"a", ["a"], ("a", "b")])
def test_a_prompt_that_is_no_text_is_a_request_error(tmp_path: Path, text: Any) -> None:
    tokenizer = Tokenizer(save(tmp_path / "tokenizer.json"))
    with pytest.raises(RequestError, match="must be text, not"):
        tokenizer.encode(text)
    with pytest.raises(RequestError, match="prompt 0 must be text, not"):
        tokenizer.encode_batch([text])


@pytest.mark.parametrize("content", [None, "", "{", "{}", '{"model": {"type": "Mystery"}}'])
def test_what_is_no_tokenizer_is_a_bundle_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json can't be read as a tokenizer"):
        Tokenizer(path)


def test_importing_the_text_modules_imports_no_package() -> None:
    """Commands that need no model, such as ``--help``, must answer at once."""
    modules = "bundle", "tokenizer", "detokenizer", "chat_template"
    program = (
        f"import sys, json\nfrom llama_runtime import {', '.join(modules)}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    loaded = set(json.loads(output))
    assert "llama_runtime" in loaded
    assert not loaded & {"numpy", "tokenizers", "minijinja", "torch", "transformers", "onnx"}
