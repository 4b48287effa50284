"""What the pages for people hold: blocks of code, inline code, links, headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
# decisions.md tells what was true on a day, so its commands and paths may be gone.
HISTORY = ("decisions.md",)
PAGES = sorted(
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    if path.is_file() and path.name not in HISTORY
)
COMMANDS = ("llama-run", "llama-export", "scripts/", "python ", "pip ")
_FENCE = re.compile(r"(`{3,})(\S*)$")
_MARKER = re.compile(r"<!-- test: (.*) -->")


@dataclass
class Block:
    """A block of code.

    Attributes:
        page: the file it stands in.
        line: of its first line of code, from 1.
        language: behind the fence; of an indented block, "sh" or what it begins like.
        text: the code.
        marker: what the comment before it says to the tests, or nothing.
    """

    page: Path
    line: int
    language: str
    text: str
    marker: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass
class Page:
    """A page, taken apart. ``prose`` has empty lines in place of its blocks."""

    path: Path
    blocks: list[Block] = field(default_factory=list)
    prose: list[str] = field(default_factory=list)

    def spans(self) -> Iterator[tuple[int, str]]:
        """Inline code, each with its line; one may go over the end of a line."""
        for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", "\n".join(self.prose)):
            line = match.string.count("\n", 0, match.start()) + 1
            yield line, " ".join(match[1].replace("\\|", "|").split())

    def links(self) -> Iterator[tuple[int, str]]:
        """Targets of links and images, each with its line."""
        text = re.sub(r"`[^`]*`", lambda match: "x" * len(match[0]), "\n".join(self.prose))
        for match in re.finditer(r"\]\(([^)\s]+)\)", text):
            yield text.count("\n", 0, match.start()) + 1, match[1]

    def anchors(self) -> set[str]:
        """What GitHub makes of its headings."""
        heads = [line.lstrip("#").strip() for line in self.prose if re.match(r"#+ ", line)]
        return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def read(path: Path) -> Page:
    """Take a page apart."""
    page, lines = Page(path), path.read_text(encoding="utf-8").splitlines()
    marker, place = "", 0
    while place < len(lines):
        line = lines[place]
        if fence := _FENCE.match(line):
            end = lines.index(fence[1], place + 1)
            block = Block(path, place + 2, fence[2], "\n".join(lines[place + 1 : end]), marker)
            end += 1
        elif line.startswith("    ") and not lines[place - 1].strip():
            end = place
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            page.blocks += _indented(path, place, lines[place:end])
            page.prose += [""] * (end - place)
            marker, place = "", end
            continue
        else:
            found = _MARKER.fullmatch(line.strip())
            marker = found[1] if found else marker if not line.strip() else ""
            page.prose.append(line)
            place += 1
            continue
        page.blocks.append(block)
        page.prose += [""] * (end - place)
        marker, place = "", end
    if marker:
        raise ValueError(f"{path}: a comment for the tests has no block behind it: {marker}")
    return page


def _indented(path: Path, start: int, lines: list[str]) -> Iterator[Block]:
    """The paragraphs of an indented block: commands, perhaps what they print, or JSON."""
    shown = False  # whether commands came before
    for line, paragraph in _paragraphs(lines):
        text = "\n".join(one[4:] for one in paragraph)
        language = "text" if shown else ""
        if text.startswith("{"):
            language = "json"
        elif text.startswith((*COMMANDS, "docker ", "zcat ")):
            language, shown = "sh", True
        yield Block(path, start + line + 1, language, text)


def _paragraphs(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    for blank, group in groupby(enumerate(lines), lambda item: not item[1].strip()):
        if not blank:
            numbers, texts = zip(*group, strict=True)
            yield numbers[0], list(texts)
