"""Byte-level BPE of a GGUF file (``tokenizer.ggml.model`` is ``gpt2``): Llama 3, SmolLM2.

What sets such tokenizers apart is how they cut a text into words before any merge. A GGUF file
only names it (``tokenizer.ggml.pre``); the rules are in llama.cpp, and in the table below.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers.pre_tokenizers import ByteLevel

from llama_decoder.fields import Fields, quoted
from llama_export.errors import ExportError
from llama_export.gguf_vocabulary import GgufVocabulary, read_list

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_AFTER_CONTRACTIONS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a text is cut into words.

    Attributes:
        patterns: regular expressions, each applied to the pieces the one before has left: its
            matches and what lies between them become pieces of their own.
        ignores_merges: a word that is a token becomes that token, merges or not.
        adds_bos: prompts start with BOS unless the metadata say otherwise.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False


_SMOLLM = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer(
    (_WORDS_AFTER_CONTRACTIONS % r"\p{N}{1,3}",), ignores_merges=True, adds_bos=True
)

PRE_TOKENIZERS = {
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "gpt-2": PreTokenizer((_GPT2,)),
    "qwen2": PreTokenizer((_WORDS_AFTER_CONTRACTIONS % r"\p{N}",)),
    "default": PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


def find_pre_tokenizer(name: str | None) -> PreTokenizer:
    """The entry of the table.

    Raises:
        ExportError: there is none; a guess would give other ids than the model was trained on.
    """
    if name is None:
        raise ExportError(
            "the GGUF metadata have no tokenizer.ggml.pre, which says how words are cut: convert "
            "the model again with a newer llama.cpp"
        )
    if name not in PRE_TOKENIZERS:
        raise ExportError(
            f"tokenizer.ggml.pre in the GGUF metadata is {quoted(name)}; supported are "
            f"{', '.join(PRE_TOKENIZERS)}: export from the Hugging Face directory instead"
        )
    return PRE_TOKENIZERS[name]


def byte_level_stages(
    fields: Fields, vocabulary: GgufVocabulary, pre_tokenizer: PreTokenizer
) -> dict[str, object]:
    """The stages of ``tokenizer.json`` that turn text without special tokens into ids and back.

    Raises:
        ExportError: the merges are missing or malformed.
    """
    cuts: list[dict[str, object]] = [
        _split({"Regex": pattern}, "Isolated") for pattern in pre_tokenizer.patterns
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*cuts, byte_level, *_drop_missing_bytes(vocabulary)],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre_tokenizer.ignores_merges,
            "vocab": vocabulary.ids,
            "merges": _read_merges(fields),
        },
    }


def _split(pattern: dict[str, str], behavior: str) -> dict[str, object]:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def _drop_missing_bytes(vocabulary: GgufVocabulary) -> list[dict[str, object]]:
    """Cut out the bytes that the vocabulary lacks (SmolLM2: 21, mostly control characters).

    The model would drop them too, but only after merging what stands on either side.
    """
    missing = sorted(set(ByteLevel.alphabet()) - vocabulary.ids.keys())
    if not missing:
        return []
    return [
        _split({"Regex": "[" + "".join(f"\\x{{{ord(c):x}}}" for c in missing) + "]"}, "Removed")
    ]


def _read_merges(fields: Fields) -> list[tuple[str, str]]:
    """Pairs in order of rank; of a pair that comes twice the first counts."""
    merges = dict.fromkeys(read_list(fields, "tokenizer.ggml.merges", str))
    pairs = []
    for merge in merges:
        space = merge.find(" ", 1)
        if space < 0:
            raise ExportError(
                f"tokenizer.ggml.merges in {fields.source} has {quoted(merge)}; a merge must be "
                "two texts and a space between them"
            )
        pairs.append((merge[:space], merge[space + 1 :]))
    return pairs
