"""A stream's text is the text of its tokens, whatever the tokens, and never a broken character.

The reference is ``tokenizers``' own ``decode`` of all tokens at once.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llama_decoder.gguf_file import GgufWeights
from llama_export.gguf_tokenizer import read_gguf_tokenizer
from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.tokenizer import Tokenizer as RuntimeTokenizer

# Whole characters at the edges of UTF-8, then bytes that cut characters or can't be in one.
CHARACTERS = ["the", " b", "é", "の", "🎉", "\ufeff", "\ufffd", "\ud7ff", "\U0010ffff"]
PIECES = [text.encode() for text in CHARACTERS] + [
    b"\xc3\xa9\xf0", b"\x9f\x8e", b"\x89 ", b"\xe2\x82", b"\xed\xa0", b"\xf4\x90", b"\xc0\x80",
]  # fmt: skip
SPELLING = "".join(sorted(pre_tokenizers.ByteLevel.alphabet()))


def spelled(data: bytes) -> str:
    """Bytes as a byte-level vocabulary writes them: those that don't print come after U+00FF."""
    low = [value for value in range(256) if chr(value) not in SPELLING]
    return "".join(chr(256 + low.index(value)) if value in low else chr(value) for value in data)


def byte_level() -> Tokenizer:
    tokens = [spelled(bytes([value])) for value in range(256)] + [spelled(one) for one in PIECES]
    backend = Tokenizer(models.BPE({token: rank for rank, token in enumerate(tokens)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<bos>", "<eos>")])
    backend.add_tokens([AddedToken(text) for text in ("<tool call>", "→", "\xa0", "Ġ ")])
    return backend


def sentencepiece(*, strip: bool) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{value:02X}>" for value in range(256)]
    tokens += ["▁", "▁the", "a", "▁▁", "é", "の", "🎉", "<0x4>", "a▁b", "\ufffd"]
    backend = Tokenizer(models.BPE({token: rank for rank, token in enumerate(tokens)}, []))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    backend.add_special_tokens([AddedToken(text, special=True) for text in tokens[:3]])
    return backend


def fallback_ids(text: str) -> list[int]:
    """A text in the byte tokens of the SentencePiece vocabulary."""
    return [3 + value for value in text.encode()]


def streamed(table: TokenBytes, token_ids: list[int]) -> list[str]:
    stream = Detokenizer(table)
    return [*map(stream.push, token_ids), stream.finish()]


BYTE_LEVEL = byte_level()
BYTE_LEVEL_TABLE = TokenBytes(BYTE_LEVEL)
STRIPPED, UNSTRIPPED = sentencepiece(strip=True), sentencepiece(strip=False)
SENTENCEPIECE_TABLE = TokenBytes(STRIPPED)

any_ids = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=30)
words = st.sampled_from([[0], [1], [2], *([word] for word in range(259, 275))])
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"))


@settings(deadline=None)
@given(any_ids)
def test_byte_level_streams_equal_decoding_all_tokens(token_ids: list[int]) -> None:
    expected = BYTE_LEVEL.decode(token_ids, skip_special_tokens=True)
    assert "".join(streamed(BYTE_LEVEL_TABLE, token_ids)) == expected


@settings(deadline=None)
@given(any_ids)
def test_what_was_shown_is_never_taken_back(token_ids: list[int]) -> None:
    whole = BYTE_LEVEL.decode(token_ids)
    shown = itertools.accumulate(streamed(BYTE_LEVEL_TABLE, token_ids))
    assert all(whole.startswith(part) for part in shown)


@settings(deadline=None)
@given(text)
def test_no_character_is_ever_shown_broken(text: str) -> None:
    by_byte = streamed(BYTE_LEVEL_TABLE, list(text.encode()))
    assert [part for part in by_byte if part] == list(text)
    by_fallback = streamed(SENTENCEPIECE_TABLE, fallback_ids(text))
    assert by_fallback == by_byte


@settings(deadline=None)
@given(st.lists(st.one_of(text.map(str.encode), st.sampled_from(PIECES)), max_size=8))
def test_replacement_characters_stand_for_invalid_bytes_only(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    *shown, rest = streamed(BYTE_LEVEL_TABLE, list(data))
    expected = data.decode("utf-8", errors="replace")
    assert "".join(shown) + rest == expected
    assert set(rest) <= {"\ufffd"}


@settings(deadline=None)
@given(st.lists(st.one_of(words, text.map(fallback_ids)), max_size=12))
def test_sentencepiece_streams_equal_decoding_all_tokens_but_for_the_first_space(
    parts: list[list[int]],
) -> None:
    token_ids = [token_id for part in parts for token_id in part]
    shown = "".join(streamed(SENTENCEPIECE_TABLE, token_ids))
    assert shown == UNSTRIPPED.decode(token_ids)
    assert shown.removeprefix(" ") == STRIPPED.decode(token_ids)


@settings(deadline=None)
@given(st.lists(st.integers(0, STRIPPED.get_vocab_size() + 3), max_size=30))
def test_sentencepiece_streams_of_invalid_bytes_replace_only_those(token_ids: list[int]) -> None:
    """The reference replaces every byte of the run that an invalid one is in, valid ones too."""
    data = b"".join(map(SENTENCEPIECE_TABLE.bytes_of, token_ids))
    assert "".join(streamed(SENTENCEPIECE_TABLE, token_ids)) == data.decode(errors="replace")


@pytest.fixture(scope="module")
def real_tokenizer_path(real_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real") / "tokenizer.json"
    path.write_bytes(read_gguf_tokenizer(GgufWeights(real_gguf).metadata).tokenizer_json)
    return path


def test_the_real_vocabulary_streams_what_it_decodes(real_tokenizer_path: Path) -> None:
    reference = Tokenizer.from_file(str(real_tokenizer_path))
    tokenizer = RuntimeTokenizer(real_tokenizer_path)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size + 50), max_size=40))
    def check(token_ids: list[int]) -> None:
        shown = "".join(streamed(tokenizer.byte_table, token_ids))
        assert shown == reference.decode(token_ids) == tokenizer.decode(token_ids)

    check()
    for token_id in range(tokenizer.vocab_size):
        shown = "".join(streamed(tokenizer.byte_table, [token_id]))
        assert shown == reference.decode([token_id])
