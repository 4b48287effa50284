"""Guesses at the next tokens of a text, from what it holds already.

Summaries, edits and code repeat runs of their prompt and of themselves. So the newest tokens are
looked up at an earlier place, and what followed them there is the guess. Source: prompt lookup
decoding (Saxena, 2023), an n-gram form of speculative decoding (Leviathan et al., "Fast inference
from transformers via speculative decoding", 2023).
"""

from __future__ import annotations

from collections.abc import Iterable

from llama_runtime.contract import MAX_DRAFT

FEWEST = 2  # tokens that must be found again: with 1, half of the guesses more are wrong
LONGEST = 8  # tokens that are compared; what is alike for longer is no better a guess
PLACES = 8  # that are compared, the latest first: their number bounds what a guess costs
FIRST_LENGTH = 4  # of a guess, before any was right or wrong
PATIENCE = 2  # guesses in a row that may be wrong from their first token on, before it pauses
LONGEST_PAUSE = 32  # tokens without a guess


class PromptLookup:
    """The tokens of one sequence, and where their runs were seen last.

    What is guessed depends on the tokens and on which guesses were right so far, and on nothing
    else: not on the load, the batch or the time.

    A guess is as long as guesses have lately been right: the length doubles when all of one was
    right, becomes one more than was right when a part was, and is halved when nothing was. When
    nothing is right several times in a row, it pauses, each time for twice as many tokens. So a
    wrong token, which costs a quarter of a step in a batch of eight, is rare in any text.

    Args:
        prompt: the prompt's tokens.
    """

    __slots__ = ("_earlier", "_latest", "_length", "_misses", "_resumes", "_token_ids")

    def __init__(self, prompt: Iterable[int]) -> None:
        self._token_ids: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # where a run of FEWEST tokens ends
        self._earlier: list[int] = []  # for each place, where the same run ended before; or -1
        self._length = FIRST_LENGTH
        self._misses = 0  # since a guess was right at all
        self._resumes = 0  # how many tokens there must be for the next guess
        for token_id in prompt:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """A token more."""
        place = len(self._token_ids)  # where the run before it ends, and what follows is known
        if place >= FEWEST:
            run = tuple(self._token_ids[-FEWEST:])
            self._earlier.append(self._latest.get(run, -1))
            self._latest[run] = place
        else:
            self._earlier.append(-1)
        self._token_ids.append(token_id)

    def draft(self, most: int) -> list[int]:
        """A guess at the next tokens; the same until a token is added.

        Args:
            most: how many there may be, 0 or more.
        """
        most = min(most, self._length)
        num_tokens = len(self._token_ids)
        if most < 1 or num_tokens < self._resumes:
            return []
        place = self._best_place()
        if place < 0:
            return []
        # What overlaps the end goes on as it repeats itself.
        period = num_tokens - place
        return [self._token_ids[place + i % period] for i in range(most)]

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """Hear how many of the last guess were right."""
        if num_accepted == num_drafted:
            self._length = min(MAX_DRAFT, max(self._length, 2 * num_drafted))
        elif num_accepted:
            self._length = num_accepted + 1
        else:
            self._length = max(1, self._length // 2)
        self._misses = 0 if num_accepted else self._misses + 1
        if self._misses >= PATIENCE:
            pause = min(LONGEST_PAUSE, 2 ** (self._misses - PATIENCE))
            self._resumes = len(self._token_ids) + pause

    def _best_place(self) -> int:
        """After the run that is like the end for longest, the latest of several; -1 if none is."""
        found, longest = -1, 0
        place = self._latest.get(tuple(self._token_ids[-FEWEST:]), -1)
        for _ in range(PLACES):
            if place < 0 or longest == LONGEST:
                break
            alike = self._num_alike(place)
            if alike > longest:
                found, longest = place, alike
            place = self._earlier[place]
        return found

    def _num_alike(self, place: int) -> int:
        """How many tokens before a place are those at the end, where FEWEST of them are."""
        tokens, count = self._token_ids, FEWEST
        while count < min(LONGEST, place) and tokens[place - count - 1] == tokens[-count - 1]:
            count += 1
        return count
