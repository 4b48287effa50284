"""SentencePiece BPE of a GGUF file (``tokenizer.ggml.model`` is ``llama``): Llama 2, TinyLlama.

Such a vocabulary has no merges: of all neighbours whose joined text is a token, those with the
best score are joined first.
"""

from __future__ import annotations

from llama_decoder.fields import Fields
from llama_export.errors import ExportError
from llama_export.gguf_vocabulary import GgufVocabulary, read_list

SPACE = "▁"


def sentencepiece_stages(fields: Fields, vocabulary: GgufVocabulary) -> dict[str, object]:
    """The stages of ``tokenizer.json`` that turn text without special tokens into ids and back.

    Raises:
        ExportError: the scores are missing, or a byte has no token to fall back to.
    """
    _check_bytes(fields, vocabulary)
    scores = read_list(fields, "tokenizer.ggml.scores", float, length=len(vocabulary.texts))
    adds_space = fields.flag("tokenizer.ggml.add_space_prefix", default=True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    decoders = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [prepend, replace] if adds_space else [replace],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [*decoders, strip] if adds_space else decoders,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary.ids,
            "merges": _rank_merges(vocabulary, scores),
        },
    }


def _check_bytes(fields: Fields, vocabulary: GgufVocabulary) -> None:
    """A character that is no token becomes the tokens of its bytes; llama.cpp aborts without."""
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary.ids]
    if missing:
        raise ExportError(
            f"tokenizer.ggml.tokens in {fields.source} lacks {len(missing)} of the 256 byte "
            f"tokens, <0x{missing[0]:02X}> for one: convert the model again"
        )


def _rank_merges(vocabulary: GgufVocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, best score of the third first.

    Different tokens have different scores in a trained vocabulary. Of equals llama.cpp would take
    whichever stands further left in the text, which no order of merges can say.
    """
    merges = [
        (scores[token_id], (text[:cut], text[cut:]))
        for token_id, text in enumerate(vocabulary.texts)
        for cut in range(1, len(text))
        if text[:cut] in vocabulary.ids and text[cut:] in vocabulary.ids
    ]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    return [pair for _, pair in merges]
