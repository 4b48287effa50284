"""What is asked: prompts and how many tokens are to follow each, made up or from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from llama_runtime.bench.lengths import Lengths
from llama_runtime.bench.sharegpt import Talk
from llama_runtime.errors import RequestError

MIN_TOKENS = 4  # of a prompt and of a reply from a file: less is noise


@dataclass(frozen=True, slots=True)
class Ask:
    """A request.

    Attributes:
        prompt: token ids for a bundle; text for a server, whose tokens are its own.
        output_len: completion tokens, neither more nor fewer.
    """

    prompt: tuple[int, ...] | str
    output_len: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that belong together.

    Attributes:
        input_len: how long prompts are, as the user wrote it, or where they come from.
        output_len: the same of completions.
        asks: the requests.
    """

    input_len: str
    output_len: str
    asks: tuple[Ask, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and completion."""
        return max(len(ask.prompt) + ask.output_len for ask in self.asks)


def synthetic(
    vocab_size: int, input_len: Lengths, output_len: Lengths, num_prompts: int, seed: int
) -> Workload:
    """Prompts of random tokens; the same for the same arguments.

    Args:
        vocab_size: V; any id below it may come, since a model computes all of them alike.
        input_len: prompt tokens.
        output_len: completion tokens.
        num_prompts: how many.
        seed: of the numbers.
    """
    numbers = np.random.default_rng(seed)
    asks = []
    for _ in range(num_prompts):
        prompt = numbers.integers(0, vocab_size, input_len.draw(numbers)).tolist()
        asks.append(Ask(tuple(prompt), output_len.draw(numbers)))
    return Workload(str(input_len), str(output_len), tuple(asks))


def from_talks(
    talks: list[Talk],
    encode: Callable[[str], list[int]],
    output_len: Lengths | None,
    num_prompts: int,
    seed: int,
    max_len: int,
) -> Workload:
    """Requests from what people have asked a chatbot, in an order that the seed chooses.

    Args:
        talks: from ``read_sharegpt``.
        encode: token ids of a text.
        output_len: completion tokens; None for as many as the reply has.
        num_prompts: how many.
        seed: of the order, and of lengths.
        max_len: the most tokens of a request; longer ones are passed over.

    Raises:
        RequestError: there are fewer that can be used.
    """
    numbers = np.random.default_rng(seed)
    asks: list[Ask] = []
    for index in numbers.permutation(len(talks)):
        talk = talks[index]
        prompt = tuple(encode(talk.prompt))
        if output_len is None:
            wanted = len(encode(talk.reply))
            too_short = wanted < MIN_TOKENS
        else:
            wanted, too_short = output_len.draw(numbers), False
        if too_short or len(prompt) < MIN_TOKENS or len(prompt) + wanted > max_len:
            continue
        asks.append(Ask(prompt, wanted))
        if len(asks) == num_prompts:
            break
    if len(asks) < num_prompts:
        raise RequestError(
            f"--num-prompts {num_prompts}, but {len(asks)} of the file's {len(talks)} "
            f"conversations have {MIN_TOKENS} tokens on each side and {max_len} at most in all: "
            "give a smaller number or another file",
            param="num_prompts",
        )
    return Workload("sharegpt", str(output_len or "sharegpt"), tuple(asks))
