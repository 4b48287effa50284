"""Prompt encoders over small tokenizers of every kind that Llamas have, for tests of chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llama_runtime.bundle import Bundle, FileEntry, Licence, Manifest, Source
from llama_runtime.contract import Geometry
from llama_runtime.prompt_encoder import PromptEncoder

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA_2 = ("<unk>", "<s>", "</s>")
# Entries that text can become: the texts of the control tokens, in merges and on their own.
S_MERGES = [("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")]


def add(backend: Backend, *texts: str, **flags: bool) -> Backend:
    backend.add_special_tokens([AddedToken(text, special=True, **flags) for text in texts])
    return backend


def vocabulary(*tokens: str) -> dict[str, int]:
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def byte_level(*, ignore_merges: bool = False) -> Backend:
    """As Llama 3 and SmolLM2 have it, with an entry <s> that letters merge to."""
    merges = [*S_MERGES, ("Ġ", "t"), ("h", "e"), ("<", "|")]
    tokens = vocabulary(*LLAMA_3, *LLAMA_2, *ALPHABET, *(a + b for a, b in merges))
    backend = Backend(models.BPE(tokens, merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"[^\s\p{L}]+|\s?\p{L}+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        if not ignore_merges
        else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    )
    backend.decoder = decoders.ByteLevel()
    # one that the vocabulary doesn't hold, as Llama 3's are, among those that it does
    return add(backend, *LLAMA_3, *LLAMA_2, "<|python_tag|>")


def spaces_and_bytes() -> decoders.Decoder:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])


def sentencepiece(kind: str) -> Backend:
    """As Llama 2 has it: the space is a letter, put before the text, or before every part of it."""
    # where a control token wants a space before it, as "normalized" has it, merges would hide that
    merges = [*(S_MERGES if kind != "normalized" else []), ("▁", "a"), ("b", "c")]
    letters = [chr(code) for code in range(33, 127)]
    tokens = vocabulary(*LLAMA_2, *BYTES, "▁", *letters, *(a + b for a, b in merges))
    backend = Backend(
        models.BPE(tokens, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    backend.decoder = spaces_and_bytes()
    return add(backend, *LLAMA_2, normalized=kind == "normalized")


def unigram() -> Backend:
    """The control tokens have the best scores there are, as in every such file."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [(text, 0.0) for text in (*LLAMA_2, *BYTES)]
    pieces += [("▁", -2.0), *((letter, -3.0) for letter in letters), ("<s", -4.0), ("▁a", -2.5)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = spaces_and_bytes()
    return add(backend, *LLAMA_2)


def make(name: str) -> Backend:
    """A tokenizer by its name in ``TOKENIZERS``."""
    kind, _, variant = name.partition(", ")
    if kind == "byte-level":
        return byte_level(ignore_merges=variant == "whole words")
    return unigram() if kind == "Unigram" else sentencepiece(variant)


TOKENIZERS = (
    "byte-level",
    "byte-level, whole words",
    "SentencePiece, first",
    "SentencePiece, prepended",
    "SentencePiece, normalized",
    "Unigram",
)


def encoder(
    folder: Path, backend: Backend, template: str, special_tokens: dict[str, str] | None = None
) -> PromptEncoder:
    """A prompt encoder over files in a folder, which is no bundle otherwise."""
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    names = ("tokenizer.json", "chat_template.jinja")
    numbers: dict[str, Any] = dict.fromkeys(Geometry.__dataclass_fields__, 1)
    manifest = Manifest(
        name="a tokenizer",
        created_by={},
        source=Source("gguf", "none.gguf", "0" * 64),
        licence=Licence(None, ()),
        geometry=Geometry(**numbers),
        graphs=(),
        special_tokens=special_tokens or {"bos_token": "<s>", "eos_token": "</s>"},
        verification={},
        files={name: FileEntry(0, "0" * 64) for name in names},
    )
    return PromptEncoder(Bundle(folder, manifest))


def special_ids(backend: Backend) -> set[int]:
    """Ids of the special tokens, but for the one that unknown characters become."""
    added = backend.get_added_tokens_decoder()
    return {number for number, token in added.items() if token.special and token.content != "<unk>"}
