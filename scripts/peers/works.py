"""What is asked of every worker: lengths of prompts and completions, and texts of those lengths."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

SLOTS = 32
NUM_REQUESTS, SHORTEST, LONGEST = 256, 16, 256  # of `mixed`, prompts and completions alike
MAX_LEN = 640  # the longest of all is 512 + 1, or 16 + 64, or 256 + 256
WORD = re.compile("Ġ[a-z]{3,10}")  # a space and a word, as byte-level vocabularies write it

QUALITY = "quality"  # isn't timed, and has no rows
WORKS = ("decode", "mixed", "prompt", "1b", QUALITY)
ASKED = {  # how many times as fast as the best peer
    "decode B=1": 1.2,
    "decode B=8": 1.5,
    "decode B=32": 1.5,
    "mixed 256": 1.5,
    "prompt 512": 1.2,
    "1b B=1": 1.1,
    "1b B=8": 1.3,
    "1b B=32": 1.5,
}


@dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
        work: the work it belongs to.
        row: its name within that work.
        lengths: tokens of the prompt and of the completion, of each request.
    """

    work: str
    row: str
    lengths: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return f"{self.work} {self.row}"

    @property
    def tokens(self) -> int:
        """What its speed is counted in: new tokens, or the prompt's where there is one new one."""
        new = sum(new for _, new in self.lengths)
        return new if new > len(self.lengths) else sum(prompt for prompt, _ in self.lengths)

    @property
    def new_tokens(self) -> list[int]:
        """Tokens of each completion."""
        return [new for _, new in self.lengths]


def cases(work: str) -> list[Case]:
    """The rows of a work."""
    if work == QUALITY:
        return []
    if work == "mixed":
        rng = random.Random(0)
        pairs = tuple(
            (rng.randint(SHORTEST, LONGEST), rng.randint(SHORTEST, LONGEST))
            for _ in range(NUM_REQUESTS)
        )
        return [Case(work, str(NUM_REQUESTS), pairs)]
    if work == "prompt":
        return [Case(work, "512", ((512, 1),))]
    return [Case(work, f"B={batch}", ((16, 64),) * batch) for batch in (1, 8, 32)]


class Texts:
    """Prompts of so many tokens of one tokenizer: common words, each of them one token.

    Args:
        tokenizer: a ``tokenizer.json`` with a byte-level vocabulary. One without words makes
            prompts of letters.
    """

    def __init__(self, tokenizer: Path) -> None:
        vocabulary = json.loads(tokenizer.read_bytes())["model"]["vocab"]
        words = sorted((token for token in vocabulary if WORD.fullmatch(token)), key=vocabulary.get)
        # The lower an id, the more frequent the word was where the tokenizer was made.
        self._words = [f" {word[1:]}" for word in words[:2000]] or list(
            "abcdefghijklmnopqrstuvwxyz"
        )

    def prompts(self, case: Case, round_number: int) -> list[str]:
        """One prompt a request: others in every round, so that none is remembered."""
        rng = random.Random(f"{case.name} {round_number}")
        return ["".join(rng.choices(self._words, k=length)) for length, _ in case.lengths]
