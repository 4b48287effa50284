"""Builds a ``tokenizer.json`` from the ``tokenizer.*`` keys of a GGUF file.

The ids are those of llama.cpp, which is what GGUF files are made for and checked with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from llama_decoder.fields import Fields, quoted
from llama_export.errors import ExportError
from llama_export.gguf_byte_level import byte_level_stages, find_pre_tokenizer
from llama_export.gguf_sentencepiece import sentencepiece_stages
from llama_export.gguf_vocabulary import GgufVocabulary, TokenKind, read_vocabulary
from llama_export.source_tokenizer import SPECIAL_TOKENS, SourceTokenizer, parse_tokenizer

# GGUF key -> name in generation_config.json, of 32-bit floats
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
FLOAT32_DIGITS = 6  # what was 0.6 reads as 0.6000000238


def read_gguf_tokenizer(metadata: Mapping[str, object]) -> SourceTokenizer:
    """Build the tokenizer that a GGUF file describes.

    Args:
        metadata: key to value, as plain Python values (str, int, float, bool, list).

    Raises:
        ExportError: the tokenizer is of a kind that isn't supported, or its parts don't fit.
        CheckpointError: a key is missing or has a value of the wrong type.
    """
    fields = Fields(metadata, "the GGUF metadata")
    model = fields.maybe_text("tokenizer.ggml.model")
    if model == "gpt2":
        pre_tokenizer = find_pre_tokenizer(fields.maybe_text("tokenizer.ggml.pre"))
        vocabulary = read_vocabulary(fields)
        stages = byte_level_stages(fields, vocabulary, pre_tokenizer)
        adds_bos = pre_tokenizer.adds_bos
    elif model == "llama":
        vocabulary = read_vocabulary(fields, {"bos": 1, "eos": 2, "unknown": 0})
        stages = sentencepiece_stages(fields, vocabulary)
        adds_bos = True
    else:
        raise ExportError(
            f"tokenizer.ggml.model in {fields.source} is {quoted(model)}; only 'gpt2' and 'llama' "
            "are supported: export from the Hugging Face directory instead"
        )
    return SourceTokenizer(
        _build_tokenizer_json(fields, vocabulary, stages, adds_bos=adds_bos),
        _build_generation_config(fields, vocabulary),
        fields.maybe_text("tokenizer.chat_template"),
        _name_special_tokens(vocabulary),
    )


def _build_tokenizer_json(
    fields: Fields, vocabulary: GgufVocabulary, stages: dict[str, object], *, adds_bos: bool
) -> bytes:
    first = last = None
    if fields.flag("tokenizer.ggml.add_bos_token", default=adds_bos):
        first = _require(vocabulary, "bos", fields)
    if fields.flag("tokenizer.ggml.add_eos_token", default=False):
        last = _require(vocabulary, "eos", fields)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _list_added_tokens(vocabulary),
        **stages,
        "post_processor": _surround(vocabulary, first, last),
    }
    encoded = json.dumps(document, ensure_ascii=False).encode()
    parse_tokenizer(encoded, source=f"the tokenizer in {fields.source}")
    return encoded


def _require(vocabulary: GgufVocabulary, role: str, fields: Fields) -> int:
    """llama.cpp takes id 11 for a byte-level model that names none, which fits only Falcon."""
    token_id = vocabulary.roles.get(role)
    if token_id is None:
        raise ExportError(
            f"{fields.source} wants {role.upper()} in every prompt but has no valid "
            f"tokenizer.ggml.{role}_token_id: convert the model again"
        )
    return token_id


def _list_added_tokens(vocabulary: GgufVocabulary) -> list[dict[str, object]]:
    """The tokens found in the text before anything else.

    Those that are not ``special`` are found even where special tokens are taken as plain text,
    and are shown when ids become text: in llama.cpp, user-defined tokens.
    """
    added = {TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED}
    return [
        {
            "id": token_id,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind is not TokenKind.USER_DEFINED,
        }
        for token_id, (text, kind) in enumerate(
            zip(vocabulary.texts, vocabulary.kinds, strict=True)
        )
        if kind in added
    ]


def _surround(
    vocabulary: GgufVocabulary, first: int | None, last: int | None
) -> dict[str, object] | None:
    """The post-processor that puts one token before the text and one after it."""
    ids = [token_id for token_id in (first, last) if token_id is not None]
    if not ids:
        return None
    names = {token_id: vocabulary.texts[token_id] for token_id in ids}

    def template(letter: str, type_id: int) -> list[dict[str, object]]:
        text: dict[str, object] = {"Sequence": {"id": letter, "type_id": type_id}}
        tokens: list[dict[str, object]] = [
            {"SpecialToken": {"id": names[token_id], "type_id": type_id}} for token_id in ids
        ]
        return [text, *tokens] if first is None else [tokens[0], text, *tokens[1:]]

    return {
        "type": "TemplateProcessing",
        "single": template("A", 0),
        "pair": [*template("A", 0), *template("B", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [token_id], "tokens": [name]}
            for token_id, name in names.items()
        },
    }


def _build_generation_config(fields: Fields, vocabulary: GgufVocabulary) -> dict[str, object]:
    """A GGUF file doesn't say ``do_sample``; llama.cpp samples with whatever values it holds."""
    config: dict[str, object] = {}
    if "bos" in vocabulary.roles:
        config["bos_token_id"] = vocabulary.roles["bos"]
    config["eos_token_id"] = list(vocabulary.end_ids)
    sampling: dict[str, object] = {
        name: round(value, FLOAT32_DIGITS)
        for key, name in SAMPLING_KEYS.items()
        if (value := fields.maybe_real(key)) is not None
    }
    top_k = fields.maybe_whole("general.sampling.top_k")
    if top_k is not None:
        sampling["top_k"] = top_k
    if sampling:
        config |= {"do_sample": True, **sampling}
    return config


def _name_special_tokens(vocabulary: GgufVocabulary) -> dict[str, str]:
    roles = dict(zip(SPECIAL_TOKENS, ("bos", "eos", "unknown", "padding"), strict=True))
    return {
        name: vocabulary.texts[vocabulary.roles[role]]
        for name, role in roles.items()
        if role in vocabulary.roles
    }
