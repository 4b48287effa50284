"""What a caller may ask of one request."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from hashlib import blake2b

from llama_runtime.errors import RequestError

MAX_SEED = 2**64 - 1
# Seeds that we draw ourselves stay below 2^53, so every JSON reader keeps their last digits.
DRAWN_SEED_BITS = 53


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    The meaning of each filter is that of ``transformers``' processors, applied in the order
    temperature, top_k, top_p.

    Attributes:
        max_tokens: the most completion tokens, at least 1.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it.
        top_k: sample among the k likeliest tokens; 0 turns the filter off.
        top_p: sample among the likeliest tokens that together hold this probability, in (0, 1].
        seed: the sequence's random stream; None draws a fresh one, which the result records.
        stop_token_ids: tokens that end the completion, beside the model's own.
        ignore_eos: go on past the model's end-of-text tokens (for measurements).

    Raises:
        RequestError: a value is out of range; ``param`` names it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p must be above 0; for greedy use temperature 0", param="top_p")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        try:
            stop_token_ids = frozenset(self.stop_token_ids)
        except TypeError:
            raise RequestError(
                f"stop_token_ids must be a collection of token ids, not {self.stop_token_ids!r}",
                param="stop_token_ids",
            ) from None
        for token_id in stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(
                f"ignore_eos must be true or false, not {self.ignore_eos!r}", param="ignore_eos"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0


def fresh_seed() -> int:
    """A seed from the system's entropy."""
    return secrets.randbits(DRAWN_SEED_BITS)


def row_seed(seed: int, row: int) -> int:
    """The seed of one row of a job.

    The first 53 bits of BLAKE2b over the two numbers as little-endian 64-bit integers, so rows of
    one job draw unrelated numbers and a row's text can be had again alone from its own seed.

    Args:
        seed: the job's seed, 0 to 2^64 - 1.
        row: the row's index in the job, from 0.
    """
    digest = blake2b(seed.to_bytes(8, "little") + row.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - DRAWN_SEED_BITS)


def _check_int(param: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"{param} must be a whole number, not {value!r}", param=param)
    if not low <= value <= high:
        raise RequestError(f"{param} must lie in {low} to {high}, not {value}", param=param)


def _check_float(param: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RequestError(f"{param} must be a number, not {value!r}", param=param)
    if not low <= value <= high:  # a NaN doesn't either
        raise RequestError(f"{param} must lie in {low:g} to {high:g}, not {value}", param=param)
