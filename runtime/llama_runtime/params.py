"""What a caller may ask of one request."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from typing import Literal

from llama_runtime.constraints import (
    KINDS,
    Constraint,
    check_alone,
    choice_texts,
    grammar_text,
    schema_text,
)
from llama_runtime.contract import MAX_TOP_LOGPROBS
from llama_runtime.errors import RequestError

MAX_SEED = 2**64 - 1
MAX_SAMPLES = 128
MAX_BIASED = 1024  # entries of logit_bias
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_PRIORITY = 100
MAX_NAME_CHARACTERS = 256  # of a caller or a salt
# Seeds that we draw ourselves stay below 2^53, so every JSON reader keeps their last digits.
DRAWN_SEED_BITS = 53


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, when it ends, and what it may expect of others.

    A row of logits goes through these in order, where they are on; the meaning is that of
    ``transformers``' processors, and of OpenAI's API for the two penalties it lacks:

    1. ``logit_bias`` is added;
    2. ``repetition_penalty`` divides the positive logits of every token of the prompt and the
       completion, and multiplies the negative ones;
    3. ``frequency_penalty``, times how often a token is in the completion, and
       ``presence_penalty``, once if it is there at all, are subtracted;
    4. end tokens are out of reach before ``min_tokens``, and so is all that would break
       ``json_schema``, ``regex``, ``choice`` or ``grammar``;
    5. ``temperature``, ``top_k``, ``top_p``, ``min_p``.

    Attributes:
        max_tokens: the most completion tokens, at least 1.
        min_tokens: how many tokens come before an end token or a stop text can end it.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it.
        top_k: sample among the k likeliest tokens; 0 turns the filter off.
        top_p: sample among the likeliest tokens that together hold this probability, in (0, 1].
        min_p: sample among the tokens at least this many times as likely as the likeliest.
        repetition_penalty: above 0; 1 turns it off, more discourages what was there before.
        presence_penalty: -2 to 2.
        frequency_penalty: -2 to 2.
        logit_bias: what is added to the logits of up to 1,024 tokens, -100 to 100 each.
        seed: the sequence's random stream; None draws a fresh one, which the result records.
        n: how many completions to make, each with a random stream of its own.
        stop: up to 16 texts of up to 256 characters that end the completion where they first
            appear, wherever the tokens' borders lie; kept as a tuple, also of a single text.
        include_stop: whether the stop text is part of the completion's text.
        stop_token_ids: tokens that end the completion, beside the model's own; kept as a
            frozenset.
        ignore_eos: go on past the model's end-of-text tokens (for measurements).
        logprobs: report each token's log-probability under the model itself, before any of the
            above.
        top_logprobs: report that many of the likeliest tokens at each place too, 0 to 20; needs
            ``logprobs`` or ``prompt_logprobs``.
        prompt_logprobs: report the log-probabilities of the prompt's tokens.
        json_schema: hold the completion to JSON that this schema allows, given as an object or as
            text; True allows any JSON. At most one of this and the next three is given. The
            completion ends where nothing may follow, or where it may end and the model ends it; one
            that runs into ``max_tokens`` or a stop text before is cut off like any other.
        regex: hold it to a regular expression, which matches all of it; the classes
            for digits, words and spaces are ASCII.
        choice: hold it to one of these texts; kept as a tuple.
        grammar: hold it to a grammar in the Lark dialect of ``llguidance``.
        speculation: "on" guesses the next tokens from what the prompt and the completion hold
            already, and has one step verify them all: the same distribution in fewer steps where a
            text repeats itself, as in summaries and edits. What is drawn is the same but for
            near-ties, because a step of several tokens rounds differently. "auto" does so only
            where no ``seed`` is given and the backend can; "off" never.
        priority: -100 to 100; who has a lower one gets a slot sooner. Each counts as ten seconds
            of waiting, so nobody waits for ever.
        deadline: seconds from its arrival after which it ends with a ``DeadlineError``, wherever it
            is; until then it is preferred as its deadline comes near. None for none.
        caller: whose request it is. Callers share the slots evenly, whatever each has waiting;
            requests without a name share with those of the same call only.
        cache_salt: requests share computed prompts only with those of the same salt, so that no
            tenant can tell by the time taken what another one asked.

    Raises:
        RequestError: a value is out of range; ``param`` names it.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    n: int = 1
    stop: str | list[str] | tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: Collection[int] = frozenset()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    json_schema: Mapping[str, object] | bool | str | None = None
    regex: str | None = None
    choice: list[str] | tuple[str, ...] | None = None
    grammar: str | None = None
    speculation: Literal["off", "on", "auto"] = "off"
    priority: int = 0
    deadline: float | None = None
    caller: str | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p must be above 0; for greedy use temperature 0", param="top_p")
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        _check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        for name in ("include_stop", "ignore_eos", "logprobs", "prompt_logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(
                    f"{name} must be true or false, not {getattr(self, name)!r:.80}", param=name
                )
        if self.top_logprobs and not (self.logprobs or self.prompt_logprobs):
            raise RequestError(
                "top_logprobs needs logprobs or prompt_logprobs to be true", param="top_logprobs"
            )
        object.__setattr__(self, "json_schema", schema_text(self.json_schema))
        object.__setattr__(self, "choice", choice_texts(self.choice))
        for name in ("regex", "grammar"):
            grammar_text(name, getattr(self, name))
        check_alone(self._constraints, self.min_tokens, ignore_eos=self.ignore_eos)
        if self.speculation not in ("off", "on", "auto"):
            raise RequestError(
                f"speculation must be off, on or auto, not {self.speculation!r:.80}",
                param="speculation",
            )
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        if self.deadline is not None:
            _check_float("deadline", self.deadline, 0.0, 1e9)
        if self.caller is not None:
            _check_name("caller", self.caller)
        _check_name("cache_salt", self.cache_salt)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether a draw is from some of the tokens only."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalized(self) -> bool:
        """Whether tokens that were there before become less, or more, likely."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def constraint(self) -> Constraint | None:
        """What the completion is held to."""
        for kind, source in self._constraints.items():
            return Constraint(kind, json.dumps(source) if kind == "choice" else str(source))
        return None

    @property
    def _constraints(self) -> dict[str, object]:
        given = {name: getattr(self, name) for name in KINDS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def speculates(self) -> bool:
        """Whether next tokens are guessed, where the backend can verify them."""
        return self.speculation == "on" or (self.speculation == "auto" and self.seed is None)


OPTIONS = tuple(option.name for option in fields(SamplingParams))


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
        raise RequestError(f"{param} must be a whole number, not {value!r:.80}", param=param)
    if not low <= value <= high:
        raise RequestError(f"{param} must lie in {low} to {high}, not {_shown(value)}", param=param)


def _check_float(param: str, value: object, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RequestError(f"{param} must be a number, not {value!r:.80}", param=param)
    if not low <= value <= high:  # a NaN doesn't either
        raise RequestError(
            f"{param} must lie in {low:g} to {high:g}, not {_shown(value)}", param=param
        )


def _check_name(param: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARACTERS or not _is_text(value):
        raise RequestError(
            f"{param} must be a text of at most {MAX_NAME_CHARACTERS} characters, not "
            f"{value!r:.80}",
            param=param,
        )


def _is_text(value: str) -> bool:
    """Whether it holds no half of a surrogate pair, which is no character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: float) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # a number of thousands of digits
        return "such a number"


def _token_ids(value: object) -> frozenset[int]:
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise RequestError(
            f"stop_token_ids must be a collection of token ids, not {value!r:.80}",
            param="stop_token_ids",
        )
    found = list(value)
    for token_id in found:
        _check_int("stop_token_ids", token_id, 0, 2**31 - 1)
    return frozenset(found)


def _bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise RequestError(
            f"logit_bias must map token ids to numbers, not {value!r:.80}", param="logit_bias"
        )
    if len(value) > MAX_BIASED:
        raise RequestError(
            f"logit_bias has {len(value)} entries, and {MAX_BIASED} at most", param="logit_bias"
        )
    for token_id, bias in value.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise RequestError(
                f"logit_bias must map token ids, not {token_id!r:.80}", param="logit_bias"
            )
        _check_int("logit_bias", token_id, 0, 2**31 - 1)
        _check_float("logit_bias", bias, -100.0, 100.0)
    return dict(value)


def _stops(value: object) -> tuple[str, ...]:
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, (tuple, list)) or not all(isinstance(text, str) for text in found):
        raise RequestError(
            f"stop must be a text or a list of texts, not {value!r:.80}", param="stop"
        )
    if len(found) > MAX_STOPS:
        raise RequestError(f"stop has {len(found)} texts, and {MAX_STOPS} at most", param="stop")
    for text in found:
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop must hold texts of 1 to {MAX_STOP_CHARACTERS} characters, not {len(text)}",
                param="stop",
            )
        if not _is_text(text):
            raise RequestError(
                "stop holds half of a surrogate pair, which is no character", param="stop"
            )
    return tuple(found)
