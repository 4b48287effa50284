"""Text to token ids and back, over a bundle's ``tokenizer.json``.

A prompt comes in one of two forms. Raw text gets the opening tokens that the tokenizer prescribes
(BOS, for most Llamas), once: a prompt that already opens with their text doesn't get them twice.
The output of a chat template gets none, because templates write their own. In both, the text of a
special token becomes that token; where a text came in with the messages, `encode_pieces` prevents
that.

The ``tokenizers`` package is imported when the first tokenizer is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llama_runtime.control_tokens import ControlTokens
from llama_runtime.errors import BundleError, RequestError, rust_reason
from llama_runtime.shadow_tokenizer import ShadowTokenizer
from llama_runtime.token_bytes import TokenBytes
from llama_runtime.tokenizer_file import read_tokenizer

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """The tokenizer of one model; safe to share between threads.

    Args:
        path: a ``tokenizer.json``.

    Raises:
        BundleError: if the file is missing or isn't a tokenizer.
    """

    def __init__(self, path: Path) -> None:
        data = read_tokenizer(path)
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_buffer(data)
        except BaseException as error:
            reason = rust_reason(error)
            raise BundleError(f"{path} can't be read as a tokenizer: {reason}") from error
        # A tokenizer saved by a training script may cut or pad every text that it encodes.
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw prompt.

        Raises:
            RequestError: if the text holds a lone surrogate, or the tokenizer fails on it.
        """
        _check_text(text, "prompt", param="prompt")
        with _encoding("prompt"):
            return _without_second_opening(self._backend.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many raw prompts, on all cores.

        Raises:
            RequestError: if one of the texts holds a lone surrogate, or the tokenizer fails on it.
        """
        for index, text in enumerate(texts):
            _check_text(text, f"prompt {index}", param="prompt")
        with _encoding("prompt"):
            return [_without_second_opening(one) for one in self._backend.encode_batch(list(texts))]

    def encode_templated(self, text: str) -> list[int]:
        """Token ids of what a chat template wrote.

        Raises:
            RequestError: if the text holds a lone surrogate, or the tokenizer fails on it.
        """
        _check_text(text, "templated conversation", param="messages")
        with _encoding("messages"):
            return self._backend.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of what a chat template wrote, of whose parts one knows what they are.

        Args:
            pieces: texts at even places, none of which becomes a control token; control tokens at
                odd ones.

        Raises:
            RequestError: if a text holds a lone surrogate, or the tokenizer fails on it.
        """
        _check_text("".join(pieces), "templated conversation", param="messages")
        with _encoding("messages"):
            return self._shadow.encode(pieces)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text that the tokens write, equal to what a `Detokenizer` streams."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token writes; none for special tokens and ids outside the vocabulary."""
        return self.byte_table.bytes_of(token_id)

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """The texts of special tokens, and how to find them in a prompt."""
        added = self._backend.get_added_tokens_decoder().values()
        return ControlTokens(
            (token.content for token in added if token.special),
            (token.content for token in added if not token.special),
        )

    @cached_property
    def special_texts(self) -> Mapping[int, str]:
        """How each special token is spelled, by its id; none of it is in a text."""
        added = self._backend.get_added_tokens_decoder().items()
        return {token_id: token.content for token_id, token in added if token.special}

    @cached_property
    def has_disguised_tokens(self) -> bool:
        """Whether other texts than a special token's own become it, such as capital letters."""
        added = self._backend.get_added_tokens_decoder().values()
        normalized = any(token.special and token.normalized for token in added)
        return normalized and self._backend.normalizer is not None

    @cached_property
    def _shadow(self) -> ShadowTokenizer:
        return ShadowTokenizer(self._backend)

    @cached_property
    def byte_table(self) -> TokenBytes:
        """The bytes of every token, as a `Detokenizer` takes them.

        Raises:
            BundleError: if the tokenizer has a decoder that Caravan doesn't know.
        """
        return TokenBytes(self._backend)

    @cached_property
    def longest_token(self) -> int:
        """The most bytes that one token writes."""
        return max(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size))

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id; the model's own V may be padded beyond it."""
        return len(self.byte_table)


@contextmanager
def _encoding(param: str) -> Iterator[None]:
    """Name the parameter in what the library raises about a text."""
    try:
        yield
    except BaseException as error:
        message = f"the tokenizer can't encode the {param}: {rust_reason(error)}"
        raise RequestError(message, param=param) from error


def _check_text(text: str, name: str, *, param: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"the {name} must be text, not {type(text).__name__}", param=param)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the {name} holds a lone surrogate, U+{ord(text[error.start]):04X}, at character "
            f"{error.start}: it can't be written as UTF-8, so remove it",
            param=param,
        ) from error


def _without_second_opening(encoding: tokenizers.Encoding) -> list[int]:
    """The ids, without the opening tokens that were put before the same ones in the text.

    The mask is 1 where the tokenizer's post-processor put a token and 0 for all that was text.
    """
    token_ids, mask = encoding.ids, encoding.special_tokens_mask
    added = mask.index(0) if 0 in mask else 0
    if added and token_ids[added : 2 * added] == token_ids[:added]:
        return token_ids[added:]
    return token_ids
