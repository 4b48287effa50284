"""The bytes that each token writes, as one table built from a tokenizer.

Two decoders are understood, the two that Llama checkpoints use:

    byte-level BPE                    Llama 3, SmolLM2: a token spells bytes as printable characters
    SentencePiece with byte fallback  Llama 2, TinyLlama: text, "▁" for a space, "<0x41>" for a byte

Any other is refused by name. Special tokens write nothing, and so do ids that no token has, such
as the padding rows of an embedding. Unlike ``tokenizers``' own ``decode``, the SentencePiece table
keeps the space that opens a text, because a completion has to read on from its prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from llama_runtime.errors import BundleError

if TYPE_CHECKING:
    import tokenizers

_FALLBACK_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_SENTENCEPIECE = [_REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]


class TokenBytes:
    """A table from token id to the bytes that the token writes.

    Args:
        tokenizer: the tokenizer whose vocabulary, special tokens and decoder are read.

    Raises:
        BundleError: if the tokenizer has another decoder than the two of this module.
    """

    __slots__ = ("_table",)

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        to_bytes = _decoder_of(tokenizer)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, token_id in vocabulary.items():
            table[token_id] = to_bytes(token)
        for token_id, added in tokenizer.get_added_tokens_decoder().items():
            if added.special:
                table[token_id] = b""
        self._table = tuple(table)

    def __len__(self) -> int:
        return len(self._table)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one token; none for special tokens and ids outside the vocabulary."""
        return self._table[token_id] if 0 <= token_id < len(self._table) else b""


def _decoder_of(tokenizer: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """What turns a token of this tokenizer into bytes, read from its decoder section."""
    decoder = tokenizer.decoder
    section = {} if decoder is None else json.loads(decoder.__getstate__())
    kind = section.get("type", "missing")
    if kind == "ByteLevel":
        return _byte_level(_byte_of_character())
    steps = section.get("decoders", [])
    if steps in (_SENTENCEPIECE, [*_SENTENCEPIECE, _STRIP]):
        return _sentencepiece
    if steps:
        kind = f"{kind} of {', '.join(step['type'] for step in steps)}"
    raise BundleError(
        f"the decoder of this tokenizer is {kind}; Caravan reads ByteLevel, and SentencePiece's "
        "Replace, ByteFallback, Fuse with or without Strip"
    )


def _byte_of_character() -> Mapping[int, str]:
    """GPT-2's spelling of bytes, inverted, as a translation to Latin-1.

    Bytes that print stand for themselves, the others for U+0100 and up in their order. Characters
    that spell no byte but would pass for one go to U+FFFF, which Latin-1 can't hold.

    Source: ``bytes_to_unicode`` of openai/gpt-2, src/encoder.py.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(0x100) if byte not in printable]
    return {
        **dict.fromkeys(others, "\uffff"),
        **{0x100 + rank: chr(byte) for rank, byte in enumerate(others)},
    }


def _byte_level(spelling: Mapping[int, str]) -> Callable[[str], bytes]:
    def to_bytes(token: str) -> bytes:
        try:
            return token.translate(spelling).encode("latin-1")
        except UnicodeEncodeError:  # an added token is written as it is
            return token.encode("utf-8")

    return to_bytes


def _sentencepiece(token: str) -> bytes:
    if _FALLBACK_BYTE.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf-8")
