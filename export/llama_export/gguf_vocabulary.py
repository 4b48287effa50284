"""The vocabulary of a GGUF file: the tokens, what kind each is, and what role some play.

Follows the loader of llama.cpp (``src/llama-vocab.cpp``): much of it goes by a token's text,
because converters leave it out of the metadata or get it wrong.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from llama_decoder.fields import Fields, quoted
from llama_export.errors import ExportError

logger = logging.getLogger(__name__)
Element = TypeVar("Element")


class TokenKind(enum.IntEnum):
    """The values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The tokens of a model, in the order of their ids.

    Attributes:
        texts: of each token, all different.
        kinds: of each token.
        ids: text to id.
        roles: ``bos``, ``eos``, ``unknown`` and ``padding`` to id, for those that the model has.
        end_ids: every id that ends a text, ``eos`` first.
    """

    texts: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    ids: dict[str, int]
    roles: dict[str, int]
    end_ids: tuple[int, ...]


# Tokens that end a text whatever the metadata say. Of llama.cpp's list those are left out that
# belong to tokenizers which are refused here, and so are its exceptions for the same tokenizers.
END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
)


class _FillToken(NamedTuple):
    """A token for filling in the middle of code: named by a key, else found by its text."""

    keys: tuple[str, ...]
    texts: tuple[str, ...]
    ends: bool


# fmt: off
_FILL_TOKENS = (
    _FillToken(
        ("fim_pre", "prefix"),
        ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>",
         "<|code_prefix|>", "<|prefix|>"),
        ends=False,
    ),
    _FillToken(
        ("fim_suf", "suffix"),
        ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
         "<|code_suffix|>", "<|suffix|>"),
        ends=False,
    ),
    _FillToken(
        ("fim_mid", "middle"),
        ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
         "<|code_middle|>", "<|middle|>"),
        ends=False,
    ),
    _FillToken(
        ("fim_pad",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"), ends=True
    ),
    _FillToken(
        ("fim_rep",),
        ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        ends=True,
    ),
    _FillToken(("fim_sep",), ("<|file_sep|>",), ends=True),
)
# fmt: on


def read_vocabulary(
    fields: Fields, default_roles: Mapping[str, int] | None = None
) -> GgufVocabulary:
    """Read the tokens and everything that says what they are for.

    Args:
        fields: the metadata of the file.
        default_roles: the ids that roles have where the metadata don't say.

    Raises:
        ExportError: a list is missing or too short, or two tokens are the same.
        CheckpointError: a key has a value of the wrong type.
    """
    texts = _read_texts(fields)
    ids = {text: token_id for token_id, text in enumerate(texts)}
    if len(ids) < len(texts):
        twice = next(text for token_id, text in enumerate(texts) if ids[text] != token_id)
        raise ExportError(
            f"tokenizer.ggml.tokens in {fields.source} has {quoted(twice)} more than once: "
            "convert the model again"
        )
    roles = dict(_read_roles(fields, default_roles or {}, len(texts)))
    fill_ids, fill_end_ids = _find_fill_tokens(fields, ids)
    end_ids = {ids[text] for text in END_TEXTS if text in ids}
    kinds = _read_kinds(fields, len(texts))
    for token_id in fill_ids | end_ids:
        kinds[token_id] = TokenKind.CONTROL
    named = (roles.get("eos"), *(_read_id(fields, name, len(ids)) for name in ("eot", "eom")))
    first = [token_id for token_id in named if token_id is not None]
    return GgufVocabulary(
        texts,
        tuple(kinds),
        ids,
        roles,
        tuple(dict.fromkeys([*first, *sorted(end_ids | fill_end_ids)])),
    )


def read_list(
    fields: Fields, key: str, element: type[Element], *, length: int = 0
) -> list[Element]:
    """A list from the metadata.

    Raises:
        ExportError: it is missing, shorter than ``length``, or holds anything but ``element``.
    """
    values = fields.get(key)
    if not isinstance(values, list) or not all(type(value) is element for value in values):
        raise ExportError(
            f"{key} in {fields.source} is {quoted(values)}; it must be a list of {element.__name__}"
        )
    if len(values) < length:
        raise ExportError(
            f"{key} in {fields.source} has {len(values)} values for {length} tokens: convert the "
            "model again"
        )
    return values


def _read_texts(fields: Fields) -> tuple[str, ...]:
    """An empty text is spelled as llama.cpp spells it; no text is ever split into it."""
    texts = read_list(fields, "tokenizer.ggml.tokens", str)
    if not texts:
        raise ExportError(f"tokenizer.ggml.tokens in {fields.source} is empty")
    return tuple(text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(texts))


def _read_kinds(fields: Fields, size: int) -> list[TokenKind]:
    key = "tokenizer.ggml.token_type"
    if fields.get(key) is None:
        return [TokenKind.NORMAL] * size
    kinds = read_list(fields, key, int, length=size)[:size]
    unknown = set(kinds) - set(TokenKind)
    if unknown:
        raise ExportError(
            f"{key} in {fields.source} has {quoted(sorted(unknown))}; supported are 0 to "
            f"{max(TokenKind)}"
        )
    return [TokenKind(kind) for kind in kinds]


def _read_roles(
    fields: Fields, defaults: Mapping[str, int], size: int
) -> Iterator[tuple[str, int]]:
    for role in ("bos", "eos", "unknown", "padding"):
        token_id = _read_id(fields, role, size)
        if token_id is None:
            token_id = defaults.get(role)
        if token_id is not None and token_id < size:
            yield role, token_id


def _find_fill_tokens(fields: Fields, ids: Mapping[str, int]) -> tuple[set[int], set[int]]:
    """Those known only by their text, which must be made control tokens; those that end a text."""
    by_text: set[int] = set()
    ends: set[int] = set()
    for token in _FILL_TOKENS:
        keyed = {_read_id(fields, name, len(ids)) for name in token.keys}
        found = {token_id for token_id in keyed if token_id is not None}
        if not found:
            found = {ids[text] for text in token.texts if text in ids}
            by_text |= found
        if token.ends:
            ends |= found
    return by_text, ends


def _read_id(fields: Fields, name: str, size: int) -> int | None:
    """The id in ``tokenizer.ggml.{name}_token_id``; converters write some that don't exist."""
    token_id = fields.maybe_whole(_id_key(name))
    if token_id is None or 0 <= token_id < size:
        return token_id
    logger.warning(
        "%s is %d, but the last token is %d: ignored, as in llama.cpp",
        _id_key(name),
        token_id,
        size - 1,
    )
    return None


def _id_key(name: str) -> str:
    return f"tokenizer.ggml.{name}_token_id"
