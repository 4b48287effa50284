"""What must hold of every text that is shipped, and what two texts have in common."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

NOTICE = Path(__file__).parent.parent / "NOTICE"


def odd_characters(text: str) -> set[str]:
    """Control characters but tab and newline, byte order marks, and what Unicode doesn't assign."""
    strange = {c for c in set(text) if unicodedata.category(c) in ("Cc", "Cf", "Cn", "Co", "Cs")}
    return strange - {"\n", "\t"}


def shared_words(one: Iterable[str], other: Iterable[str], length: int) -> set[tuple[str, ...]]:
    """The runs of so many words that occur in a text of both, whatever stands between words."""
    return _all_words(one, length) & _all_words(other, length)


def shared_characters(one: Iterable[str], other: Iterable[str], length: int) -> set[str]:
    """The runs of so many characters, blanks made one, that occur in a text of both."""
    return _all_characters(one, length) & _all_characters(other, length)


def noticed(folder: str) -> dict[str, str]:
    """What NOTICE says of each text of a folder, by the name of its file."""
    after = NOTICE.read_text(encoding="utf-8").partition(f"\n{folder} (")[2]
    section = re.split(r"^\w+/\S+ \(", after, flags=re.MULTILINE)[0]
    heads = [*re.finditer(r"^(\S+\.txt)\n", section, flags=re.MULTILINE), None]
    return {
        head[1]: section[head.end() : following.start() if following else None]
        for head, following in pairwise(heads)
        if head
    }


def named_licences(notices: Iterable[str]) -> set[str]:
    """The licence files that a notice points to, as ``package folder/licences/name``."""
    return {name for notice in notices for name in re.findall(r"\w+/licences/\w+\.txt", notice)}


def _all_words(texts: Iterable[str], length: int) -> set[tuple[str, ...]]:
    runs: set[tuple[str, ...]] = set()
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        runs.update(zip(*(words[start:] for start in range(length)), strict=False))
    return runs


def _all_characters(texts: Iterable[str], length: int) -> set[str]:
    blanks = (" ".join(text.split()) for text in texts)
    return {text[i : i + length] for text in blanks for i in range(len(text) - length + 1)}
