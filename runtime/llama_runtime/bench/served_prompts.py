"""Prompts for a server whose tokenizer isn't here: words, or what people have asked."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from llama_runtime.bench.lengths import Lengths
from llama_runtime.bench.sharegpt import Talk
from llama_runtime.bench.workload import Ask
from llama_runtime.errors import RequestError

CHARACTERS_A_TOKEN = 4  # of a reply whose tokens nobody here can count
# Of four letters each, so that they come to the same in tokens of bytes, and common enough to be a
# token each where tokens are words.
_TEXT = """
time year work life hand part case week head home room fact line name book word city
game team idea body back door face side road wood tree fish bird ship wind rain snow
fire lake hill farm milk food cake salt blue gold iron king moon star song note play
film news mind love hope fear plan test step view area land town
"""
WORDS = tuple(_TEXT.split())


class Words:
    """Prompts of common words, as many as come to a number of the server's tokens.

    Args:
        input_len: prompt tokens.
        output_len: completion tokens.
        per_word: the server's tokens for a word, as it has counted.
        around: those that come with every prompt, as a chat template's.
    """

    def __init__(
        self, input_len: Lengths, output_len: Lengths, per_word: float, around: float
    ) -> None:
        self._input, self._output = input_len, output_len
        self._per_word, self._around = per_word, around
        self.input_len, self.output_len = str(input_len), str(output_len)

    def asks(self, num_prompts: int, seed: int) -> list[Ask]:
        """Others for another seed, so that a server's cache of prompts has no part in it."""
        numbers = np.random.default_rng(seed)
        found = []
        for _ in range(num_prompts):
            tokens = self._input.draw(numbers)
            count = max(1, round((tokens - self._around) / self._per_word))
            prompt = " ".join(WORDS[i] for i in numbers.integers(0, len(WORDS), count))
            found.append(Ask(prompt, self._output.draw(numbers)))
        return found


class Talks:
    """Prompts of a data set.

    Args:
        talks: questions and answers.
        output_len: completion tokens; None for about as many as the answer has.
    """

    input_len = "sharegpt"

    def __init__(self, talks: Seq[Talk], output_len: Lengths | None) -> None:
        self._talks, self._output = talks, output_len
        self.output_len = "sharegpt" if output_len is None else str(output_len)

    def asks(self, num_prompts: int, seed: int) -> list[Ask]:
        """In an order that the seed chooses.

        Raises:
            RequestError: there are fewer.
        """
        if len(self._talks) < num_prompts:
            raise RequestError(
                f"--num-prompts {num_prompts}, but the file has {len(self._talks)} conversations "
                "that can be used: give a smaller number or another file",
                param="num_prompts",
            )
        numbers = np.random.default_rng(seed)
        found = []
        for index in numbers.permutation(len(self._talks))[:num_prompts]:
            prompt, reply = self._talks[index]
            wanted = max(1, len(reply) // CHARACTERS_A_TOKEN)
            found.append(Ask(prompt, self._output.draw(numbers) if self._output else wanted))
        return found
