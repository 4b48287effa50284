"""A model's vocabulary as ``llguidance`` takes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llama_runtime.token_bytes import TokenBytes
from llama_runtime.tokenizer_file import read_tokenizer

_MARK = "\x02"  # merges with nothing


class GrammarVocabulary:
    """What ``llguidance.TokenizerWrapper`` asks of a tokenizer.

    Where a grammar leaves one text, such as the next key of an object, this says by which tokens it
    is written: those that the tokenizer makes of it. Two things about that are our own: the text of
    a control token is text, and text that the tokenizer would change, as SentencePiece changes "▁",
    is spelt from the longest tokens that it begins with.

    Args:
        path: a ``tokenizer.json``.
        vocab_size: V, which may be padded beyond the tokens that there are.
        eos_token_ids: one at least.

    Attributes:
        eos_token_id: one of them.
        bos_token_id: not used.
        tokens: the bytes of each token; the name of a control token, by which grammars call it.
        special_token_ids: which of them are control tokens.
        size: V.
        control_tokens: the names of those by their ids.
    """

    bos_token_id: int | None = None

    def __init__(self, path: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_buffer(read_tokenizer(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._table = TokenBytes(self._tokenizer)
        self._mark = self._encoded(_MARK)
        texts = [self._table.bytes_of(i) for i in range(vocab_size)]
        added = self._tokenizer.get_added_tokens_decoder()
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = [i for i, text in enumerate(texts) if i in added and not text]
        self.size = vocab_size
        self.control_tokens = {i: added[i].content for i in self.special_token_ids}
        self._by_bytes = {text: i for i, text in enumerate(texts) if text}
        self._longest = max(map(len, texts))
        self.tokens = [
            text or (added[i].content.encode() if i in added else b"")
            for i, text in enumerate(texts)
        ]

    def __call__(self, text: bytes) -> list[int]:
        """The tokens that write a piece of a text, wherever in it."""
        try:
            encoded = self._encoded(_MARK + text.decode("utf-8"))
        except UnicodeDecodeError:  # a character may be cut in two
            return self._spelt(text)
        token_ids = encoded[len(self._mark) :]
        written = b"".join(map(self._table.bytes_of, token_ids))
        if encoded[: len(self._mark)] != self._mark or written != text:
            return self._spelt(text)
        return token_ids

    def _encoded(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return token_ids

    def _spelt(self, text: bytes) -> list[int]:
        """The longest token that a text begins with, and so on; the rest, if none goes on."""
        token_ids: list[int] = []
        place = 0
        while place < len(text):
            for end in range(min(len(text), place + self._longest), place, -1):
                if (token_id := self._by_bytes.get(text[place:end])) is not None:
                    token_ids.append(token_id)
                    place = end
                    break
            else:
                break
        return token_ids
