"""Texts drawn at random from what a schema allows, and somebody else's verdict on them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import FormatChecker, ValidationError
from jsonschema.protocols import Validator
from jsonschema.validators import Draft202012Validator, validator_for

from llama_runtime.grammar_masks import MaskFiller, Masks, mask_words
from llama_runtime.grammars import GrammarCompiler
from llama_runtime.params import SamplingParams
from llama_runtime.tokenizer import Tokenizer
from tests.structured.builders import Schema

CLOSING = ('"', "@", "]", "}")  # what begins like these mostly leads to an end
HURRY = 0.4  # the share of tokens that are drawn from the first of those that are allowed
DIGITS = 5_000  # so many are exact, which floats are not


@dataclass(frozen=True, slots=True)
class Walk:
    """A text that was drawn.

    Attributes:
        text: so far.
        num_tokens: it has, with the one that ended it.
        finished: whether the schema is satisfied.
    """

    text: str
    num_tokens: int
    finished: bool


class Walker:
    """Draws texts under a schema, as a model would that knows nothing.

    Args:
        tokenizer: a ``tokenizer.json``.
        vocab_size: V.
        eos_token_id: what ends a text that may end.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_id: int) -> None:
        self.compiler = GrammarCompiler(tokenizer, vocab_size, [eos_token_id])
        self._tokenizer = Tokenizer(tokenizer)
        self._vocab_size, self._eos = vocab_size, eos_token_id
        self._masks: Masks = np.zeros((1, mask_words(vocab_size)), np.int32)
        self._filler = MaskFiller(threads=1)
        texts = [self._tokenizer.token_bytes(i).decode(errors="replace") for i in range(vocab_size)]
        self._closing = [np.array([t.startswith(c) for t in texts]) for c in CLOSING]

    def walk(self, schema: Schema, seed: int, max_tokens: int) -> Walk:
        """Draw tokens until the text is complete or has so many.

        Raises:
            RequestError: the schema doesn't compile, or needs more than the limits on the way.
        """
        constraint = SamplingParams(json_schema=schema).constraint
        assert constraint is not None
        matcher = self.compiler.matcher(constraint)
        rng, token_ids = np.random.default_rng(seed), list[int]()
        while len(token_ids) < max_tokens and not matcher.is_complete:
            token_id = self._draw(matcher, rng)
            if token_id == self._eos:
                matcher.end()
                return Walk(self._tokenizer.decode(token_ids), len(token_ids) + 1, True)
            matcher.accept(token_id)
            token_ids.append(token_id)
        if matcher.is_complete:
            matcher.end()  # which raises if it is so because of an error
        return Walk(self._tokenizer.decode(token_ids), len(token_ids), matcher.is_complete)

    def _draw(self, matcher: Any, rng: np.random.Generator) -> int:
        self._filler.fill([(0, matcher, ())], self._masks)
        bits = np.unpackbits(self._masks[0].view(np.uint8), bitorder="little")
        allowed = bits[: self._vocab_size].astype(np.bool_)
        if rng.random() < HURRY:
            if allowed[self._eos]:
                return self._eos
            closing = (allowed & tokens for tokens in self._closing)
            allowed = next((tokens for tokens in closing if tokens.any()), allowed)
        return int(rng.choice(np.flatnonzero(allowed)))


def _formats() -> FormatChecker:
    """jsonschema's checks, but that every year may have a 29th of February and a 60th second.

    RFC 3339 allows the seconds, which Python's clock lacks; which years are leap years, grammars
    don't count.
    """
    checker = FormatChecker(())
    checker.checkers = dict(Draft202012Validator.FORMAT_CHECKER.checkers)
    for name in ("date", "time", "date-time"):
        check, raises = checker.checkers[name]
        checker.checkers[name] = partial(_on_some_day, check), raises
    return checker


def _on_some_day(check: Callable[[object], bool], value: object) -> bool:
    if isinstance(value, str):
        value = re.sub("^[0-9]{4}(?=-)", "2000", value)
        value = re.sub(":60(?=[.zZ+-])", ":59", value)
    return check(value)


def validator(schema: Schema) -> Validator:
    """jsonschema's verdict by the schema's own draft, with formats, and with exact numbers."""
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    cls = validator_for(schema, default=Draft202012Validator)
    return cls(exact, format_checker=FORMATS)


FORMATS = _formats()


def complaint(schema: Schema, text: str) -> str | None:
    """What is wrong with a text under a schema; None if nothing is."""
    try:
        value = json.loads(text, parse_float=Decimal, parse_constant=_refuse)
    except ValueError as error:
        return f"no JSON: {error}"
    with localcontext(prec=DIGITS):
        try:
            validator(schema).validate(value)
        except ValidationError as error:
            return error.message
    return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
