"""Turn a stream of token ids into text, one token at a time, without ever breaking a character.

Tokens hold bytes and a character may be spread over several of them. A `Detokenizer` keeps back
the bytes of a character until its last one arrives, so what it returns can be shown at once. The
text of all calls, put together, is the text of all tokens decoded at once.
"""

from __future__ import annotations

import codecs

from llama_runtime.token_bytes import TokenBytes

__all__ = ["Detokenizer", "TokenBytes"]

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sequence; each token costs the same, however long the sequence is.

    U+FFFD stands for bytes that no UTF-8 text can hold: it shows as soon as that is certain, and
    for a character that the sequence ended in the middle of.

    Args:
        table: the bytes of each token, shared by all sequences.
    """

    __slots__ = ("_decoder", "_table")

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._decoder = _Utf8Decoder(errors="replace")

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that it completes, which may be empty."""
        return self._decoder.decode(self._table.bytes_of(token_id))

    def finish(self) -> str:
        """Return what is left when no more tokens come: nothing, or U+FFFD."""
        return self._decoder.decode(b"", final=True)
