"""Look at a ``tokenizer.json`` before the ``tokenizers`` library does.

The library was made for files of people one trusts: some parts of a tokenizer end the process or
make it panic, a few rules that replace a letter by a thousand fill the memory, and a table by token
id is as long as the highest id. So a file may only hold what tokenizers of Llama checkpoints hold,
and no more of it than a vocabulary of its size can need.

Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_runtime.errors import BundleError, one_line

MAX_FILE_BYTES = 2**26  # Llama 3's has 17 MB
MAX_STEPS = 64  # of one section, nested ones included
MAX_GROWTH = 64  # characters that the normalizer may make of one
MAX_ADDED_CHARACTERS = 512  # of the text of an added token
MAX_SPECIAL_IDS = 64  # that one prompt may get around its text
SPARE_IDS = 1024  # ids that no token has, beside one for each that there is

_KINDS = {
    "model": {"BPE", "Unigram"},
    "normalizer": {
        "Sequence",
        "Prepend",
        "Replace",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Lowercase",
        "Strip",
        "StripAccents",
        "Nmt",
        "ByteLevel",
    },
    "pre_tokenizer": {
        "Sequence",
        "Split",
        "ByteLevel",
        "Metaspace",
        "Digits",
        "Punctuation",
        "Whitespace",
        "WhitespaceSplit",
        "UnicodeScripts",
        "BertPreTokenizer",
    },
    "post_processor": {"Sequence", "ByteLevel", "TemplateProcessing"},
}
# Where a section keeps the steps of a sequence.
_STEPS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
}

Section = Mapping[str, Any]


def read_tokenizer(path: Path) -> bytes:
    """The contents of a ``tokenizer.json``, checked.

    Raises:
        BundleError: it is missing, or breaks a rule of this module.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BundleError(f"{path} has {size:,} bytes and may have {MAX_FILE_BYTES:,} at most")
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} can't be read as a tokenizer: {error}") from error
    problem = find_problem(data)
    if problem is not None:
        raise BundleError(f"{path} can't be read as a tokenizer: {problem}")
    return data


def find_problem(data: bytes) -> str | None:
    """Why a tokenizer could do harm, or can't be used; None if nothing is wrong with it.

    Args:
        data: the contents of a ``tokenizer.json``.
    """
    try:
        document = json.loads(data, object_pairs_hook=_without_repeats)
        if not isinstance(document, dict):
            return "it must hold a JSON object"
        _check_document(document)
    except (_RefusedError, ValueError, RecursionError) as error:
        return str(error)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        return f"a part of it is not what it should be ({one_line(error, 80)})"
    return None


class _RefusedError(Exception):
    """Why a tokenizer is refused."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that comes twice, two readers may take different values."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _RefusedError("an object in it has the same key twice")
    return value


def _check_document(document: Section) -> None:
    model = document.get("model") or {}
    if model.get("type", "BPE") not in _KINDS["model"]:
        raise _unknown("model", model.get("type"))
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _RefusedError(f"its model has {name} {model[name]!r:.80}, which isn't supported")
    if model.get("type") == "Unigram" and model.get("unk_id") is None:
        raise _RefusedError("its model has no unk_id, so some texts have no tokens")
    _check_ids(model, document.get("added_tokens") or [])
    normalizers = _steps(document, "normalizer")
    _check_growth(normalizers)
    _steps(document, "pre_tokenizer")
    _check_post_processor(_steps(document, "post_processor"))


def _check_ids(model: Section, added_tokens: list[Section]) -> None:
    """Tables by token id must not be much longer than there are tokens."""
    vocabulary = model.get("vocab") or {}
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    added_ids = [token["id"] for token in added_tokens]
    highest = max(max(ids, default=0), max(added_ids, default=0))
    limit = 2 * (len(vocabulary) + len(added_ids)) + SPARE_IDS
    if highest > limit:
        raise _RefusedError(
            f"its highest token id is {highest:,}, and with {len(vocabulary) + len(added_ids):,} "
            f"tokens it may be {limit:,} at most"
        )
    longest = max((len(token["content"]) for token in added_tokens), default=0)
    if longest > MAX_ADDED_CHARACTERS or not all(token["content"] for token in added_tokens):
        raise _RefusedError(
            f"the text of an added token must have 1 to {MAX_ADDED_CHARACTERS} characters"
        )


def _check_growth(normalizers: list[Section]) -> None:
    """Bound how long a prompt can become before it is cut into tokens."""
    growth = 1.0
    for step in normalizers:
        if step["type"] == "Prepend" and len(step["prepend"]) > MAX_GROWTH:
            raise _RefusedError(f"its normalizer prepends more than {MAX_GROWTH} characters")
        if step["type"] != "Replace":
            continue
        pattern, content = step["pattern"].get("String"), step["content"]
        if pattern == "":
            raise _RefusedError("its normalizer replaces an empty text")
        if pattern is None:  # a regular expression may match between any two characters
            growth *= 1 + len(content)
        else:
            growth *= max(1.0, len(content) / len(pattern))
    if growth > MAX_GROWTH:
        raise _RefusedError(
            f"its normalizer makes up to {growth:,.0f} characters of one; {MAX_GROWTH} is the limit"
        )


def _check_post_processor(processors: list[Section]) -> None:
    templates = [step for step in processors if step["type"] == "TemplateProcessing"]
    if len(templates) > 1:
        raise _RefusedError("its post_processor has more than one template")
    for template in templates:
        pieces = template["single"]
        texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
        names = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
        added = sum(len(template["special_tokens"][name]["ids"]) for name in names)
        if texts != ["A"] or added > MAX_SPECIAL_IDS:
            raise _RefusedError(
                f"its post_processor must hold the text once and at most {MAX_SPECIAL_IDS} special "
                f"tokens, not the text {len(texts)} times and {added} tokens"
            )


def _steps(document: Section, name: str) -> list[Section]:
    """The steps of a section, sequences taken apart."""
    steps = list(_flat(document.get(name), name, depth=0))
    if len(steps) > MAX_STEPS:
        raise _RefusedError(f"its {name} has {len(steps)} steps; {MAX_STEPS} is the limit")
    return steps


def _flat(section: Section | None, name: str, depth: int) -> Iterator[Section]:
    if section is None:
        return
    if section["type"] not in _KINDS[name] or depth > MAX_STEPS:
        raise _unknown(name, section["type"])
    if section["type"] != "Sequence":
        yield section
        return
    for step in section[_STEPS[name]]:
        yield from _flat(step, name, depth + 1)


def _unknown(name: str, kind: object) -> _RefusedError:
    return _RefusedError(
        f"its {name} is of the kind {kind!r:.80}; Caravan reads {', '.join(sorted(_KINDS[name]))}"
    )
