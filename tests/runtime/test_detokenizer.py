"""The table of token bytes, and the decoders that it is read from."""

from __future__ import annotations

import itertools
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from llama_runtime.detokenizer import Detokenizer, TokenBytes
from llama_runtime.errors import BundleError

SENTENCEPIECE = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def byte_level(*tokens: str) -> Tokenizer:
    backend = Tokenizer(models.BPE({token: rank for rank, token in enumerate(tokens)}, []))
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(*tokens: str, steps: list[decoders.Decoder] = SENTENCEPIECE) -> Tokenizer:
    backend = Tokenizer(models.BPE({token: rank for rank, token in enumerate(tokens)}, []))
    backend.decoder = decoders.Sequence(steps)
    return backend


def contents(table: TokenBytes) -> list[bytes]:
    return [table.bytes_of(token_id) for token_id in range(len(table))]


def test_byte_level_tokens_spell_every_byte_once() -> None:
    table = TokenBytes(byte_level(*sorted(pre_tokenizers.ByteLevel.alphabet())))
    assert sorted(contents(table)) == [bytes([value]) for value in range(256)]


def test_byte_level_tokens_that_spell_no_bytes_are_written_as_they_are() -> None:
    tokens = ["Ġthe", "a b", "→", "\x80", "\xad", "\uffff", "Ġ\n"]
    expected = [b" the", *(token.encode() for token in tokens[1:])]
    assert contents(TokenBytes(byte_level(*tokens))) == expected


def test_sentencepiece_tokens_are_text_or_one_byte() -> None:
    tokens = ["▁the", "▁", "a▁b", "<0x41>", "<0xff>", "<0x4>", "<0xGG>", "x<0x41>", "é"]
    expected = [b" the", b" ", b"a b", b"A", b"\xff", b"<0x4>", b"<0xGG>", b"x<0x41>", b"\xc3\xa9"]
    assert contents(TokenBytes(sentencepiece(*tokens))) == expected
    assert contents(TokenBytes(sentencepiece(*tokens, steps=SENTENCEPIECE[:3]))) == expected


def test_special_tokens_write_nothing_and_added_ones_do() -> None:
    backend = byte_level("a")
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    assert contents(TokenBytes(backend)) == [b"a", b"", b"<tool>"]


def test_ids_without_a_token_write_nothing() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    backend.decoder = decoders.ByteLevel()
    table = TokenBytes(backend)
    assert contents(table) == [b"a", b"", b"", b"", b"", b"b"]
    assert [table.bytes_of(token_id) for token_id in (-1, 6, 2**40)] == [b"", b"", b""]
    assert len(TokenBytes(byte_level())) == 0


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (None, "decoder of this tokenizer is missing"),
        (decoders.WordPiece(), "is WordPiece"),
        (decoders.Metaspace(), "is Metaspace"),
        (decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]), "of ByteFallback, Fuse"),
        (decoders.Sequence([decoders.Replace("_", " "), *SENTENCEPIECE[1:]]), "is Sequence of"),
        (decoders.Sequence([*SENTENCEPIECE[:3], decoders.Strip(" ", 2, 0)]), "is Sequence of"),
    ],
)
def test_other_decoders_are_refused_by_name(decoder: decoders.Decoder | None, words: str) -> None:
    backend = byte_level("a")
    if decoder is None:
        backend = Tokenizer(models.BPE({"a": 0}, []))
    else:
        backend.decoder = decoder
    with pytest.raises(BundleError, match=words):
        TokenBytes(backend)


def test_a_character_shows_when_its_last_byte_comes() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = TokenBytes(byte_level(*alphabet))
    ids = {table.bytes_of(token_id): token_id for token_id in range(256)}
    stream = Detokenizer(table)
    pushed = [stream.push(ids[bytes([value])]) for value in "aé🎉".encode()]
    assert pushed == ["a", "", "é", "", "", "", "🎉"]
    assert stream.finish() == ""


def test_bytes_that_are_no_text_show_as_soon_as_that_is_certain() -> None:
    table = TokenBytes(sentencepiece("<0xE2>", "<0x82>", "<0xAC>", "a"))
    stream = Detokenizer(table)
    assert [stream.push(token_id) for token_id in (0, 1, 3, 2, 0, 1)] == [
        "", "", "\ufffda", "\ufffd", "", "",
    ]  # fmt: skip
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_streams_share_a_table_and_nothing_else() -> None:
    table = TokenBytes(sentencepiece("<0xC3>", "<0xA9>", "a"))
    first, second = Detokenizer(table), Detokenizer(table)
    assert first.push(0) == ""
    assert second.push(2) == "a"
    assert first.push(1) == "é"


def test_a_completion_keeps_the_space_that_opens_it() -> None:
    backend = sentencepiece("▁is", "▁blue")
    assert backend.decode([0, 1]) == "is blue"
    stream = Detokenizer(TokenBytes(backend))
    assert stream.push(0) + stream.push(1) + stream.finish() == " is blue"


@pytest.mark.alone
def test_a_large_vocabulary_becomes_a_table_quickly() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["".join(pair) for pair in itertools.product(alphabet, repeat=2)]
    backend = byte_level(*pairs, *(f"Ġ{pair}" for pair in pairs[: 128_000 - len(pairs)]))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        TokenBytes(backend)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.6, "0.12 s for 128,000 tokens where this was written"
