"""Log-probabilities in the two forms of OpenAI's API, and what tokens are called in them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from llama_runtime.completion import Completion, Prompt
from llama_runtime.sequence import TokenLogprob
from llama_runtime.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")
LEAST_LOGPROB = -9999.0  # what OpenAI writes for less; JSON has no infinity


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    r"""What a token is called: its text, or how it is spelled if it is special.

    One that holds a part of a character only is called by its bytes, ``bytes:\xe2\x80``, as
    OpenAI's models do; one that nothing is known of ``token_id:7``, as vLLM does.
    """
    data = tokenizer.token_bytes(token_id)
    if not data:
        return tokenizer.special_texts.get(token_id, f"token_id:{token_id}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, items: Seq[TokenLogprob]) -> list[dict[str, object]]:
    """The ``content`` of a chat's log-probabilities, an entry a token.

    Args:
        tokenizer: of the model.
        items: of the tokens of the answer, those that wrote no text included, such as its end.
    """
    return [
        _entry(tokenizer, item.token_id, item.logprob)
        | {"top_logprobs": [_entry(tokenizer, *likely) for likely in item.top]}
        for item in items
    ]


def completion_logprobs(
    tokenizer: Tokenizer, items: Seq[TokenLogprob | None], token_ids: Seq[int], offsets: Seq[int]
) -> dict[str, object]:
    """The log-probabilities of a completion: four lists, a place a token.

    Args:
        tokenizer: of the model.
        items: of each token; None for the first of an echoed prompt, which nothing precedes.
        token_ids: the tokens.
        offsets: where in the choice's text each begins, in characters.
    """
    return {
        "tokens": [token_name(tokenizer, token_id) for token_id in token_ids],
        "token_logprobs": [item and _finite(item.logprob) for item in items],
        "top_logprobs": [item and _top(tokenizer, item) for item in items],
        "text_offset": list(offsets),
    }


class TextOffsets:
    """Where the tokens of a completion begin in the text of its choice, as they come.

    A token in the middle of a character is where the character is.

    Args:
        tokenizer: of the model.
        start: where the completion begins, in characters.
    """

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        self._tokenizer = tokenizer
        self._reader = _Reader()
        self._at = start

    def push(self, token_id: int) -> int:
        """Where the next token begins; a stop text may cut off the text before that."""
        unfinished, text = self._reader.push(self._tokenizer.token_bytes(token_id))
        start = self._at + unfinished
        self._at += len(text)
        return start


def completion_offsets(tokenizer: Tokenizer, completion: Completion, start: int) -> Iterator[int]:
    """Where each token of a completion begins in the text of its choice.

    One that a stop text cut off is at the end; see ``TextOffsets`` for the others.

    Args:
        tokenizer: of the model.
        completion: tokens and text.
        start: where the completion begins.
    """
    offsets = TextOffsets(tokenizer, start)
    end = start + len(completion.text)
    for token_id in completion.token_ids:
        yield min(offsets.push(token_id), end)


def prompt_offsets(tokenizer: Tokenizer, text: str, token_ids: Seq[int]) -> Iterator[int]:
    """Where each token of an echoed prompt begins in its text.

    Tokens that the tokenizer put there take no room, such as an opening one, or the space that
    SentencePiece puts before a text.

    Args:
        tokenizer: of the model.
        text: what is echoed; see ``echoed``.
        token_ids: its tokens.
    """
    reader = _Reader()
    at = 0
    for token_id in token_ids:
        special = tokenizer.special_texts.get(token_id)
        if special is not None:
            yield at
            at += len(special) if text.startswith(special, at) else 0
            continue
        unfinished, piece = reader.push(tokenizer.token_bytes(token_id))
        if piece.startswith(" ") and not text.startswith(" ", at):
            piece = piece[1:]
        yield min(at + unfinished, len(text))
        at = min(at + len(piece), len(text))


def echoed(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """The text of a prompt: as it came, or what its tokens write."""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)


class _Reader:
    """Where tokens begin in the text that their bytes are."""

    def __init__(self) -> None:
        self._decoder = _Utf8Decoder(errors="replace")

    def push(self, data: bytes) -> tuple[int, str]:
        """Take the bytes of the next token.

        Returns:
            How many characters (U+FFFD, one at most) stand before the token for what the one before
            began and it doesn't go on with; and the text that becomes complete, those included.
        """
        is_pending = self._decoder.getstate()[0] != b""
        goes_on = not data or data[0] & 0xC0 == 0x80
        return int(is_pending and not goes_on), self._decoder.decode(data)


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    data = tokenizer.token_bytes(token_id)
    return {
        "token": token_name(tokenizer, token_id),
        "logprob": _finite(logprob),
        "bytes": list(data) if data else None,
    }


def _top(tokenizer: Tokenizer, item: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens by name, and the token itself, which may not be among them.

    Of tokens with one name the likeliest counts.
    """
    named: dict[str, float] = {}
    for token_id, logprob in (*item.top, (item.token_id, item.logprob)):
        named.setdefault(token_name(tokenizer, token_id), _finite(logprob))
    return named


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
