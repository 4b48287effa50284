"""Text that ends a completion, found in the text whatever its tokens are."""

from __future__ import annotations

from collections.abc import Sequence as Seq


class StopTexts:
    """The text of one sequence, up to where the first of its stop texts begins.

    What could still become a stop text is held back, so what has been given out stays true. Stop
    texts are looked for in the text, so it doesn't matter which tokens they are spread over.

    Args:
        texts: what ends the sequence; none holds nothing back.
        include: whether the stop text is given out too.

    Attributes:
        found: the stop text that ended it, or None.
    """

    __slots__ = ("_held", "_include", "_texts", "found")

    def __init__(self, texts: Seq[str] = (), *, include: bool = False) -> None:
        self._texts = texts
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Take the next text and return what can be given out.

        Args:
            text: what the next token completes.
            may_stop: whether a stop text that ends in it counts; otherwise it is text as any other.
        """
        if not self._texts:
            return text
        seen = self._held + text
        if may_stop and (match := self._first_match(seen, len(self._held))):
            start, self.found = match
            self._held = ""
            return seen[: start + len(self.found)] if self._include else seen[:start]
        keep = self._unfinished(seen)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def finish(self) -> str:
        """Return what is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, seen: str, new_from: int) -> tuple[int, str] | None:
        """Where the stop text begins that is complete first, and which it is.

        It has to end in the new part. So tokens' borders don't show: character by character the
        same one would be found.
        """
        matches = []
        for text in self._texts:
            start = seen.find(text, max(0, new_from - len(text) + 1))
            if start >= 0:
                matches.append((start + len(text), start, text))
        if not matches:
            return None
        _, start, text = min(matches)
        return start, text

    def _unfinished(self, seen: str) -> int:
        """The length of the longest end of the text that a stop text begins with."""
        longest = min(len(seen), max(map(len, self._texts)) - 1)
        for length in range(longest, 0, -1):
            if any(text.startswith(seen[-length:]) for text in self._texts):
                return length
        return 0
