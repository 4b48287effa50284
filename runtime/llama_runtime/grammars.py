"""From what a completion is held to, to the tokens that may come next.

``llguidance`` compiles a constraint against the vocabulary and says, as a completion grows, which
tokens keep it within the grammar: one bit a token, in some microseconds. It needs no torch, holds
no lock of Python while it computes, and is imported with the first constraint.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llama_runtime import grammar_check
from llama_runtime.constraints import Constraint
from llama_runtime.errors import RequestError, one_line
from llama_runtime.grammar_vocabulary import GrammarVocabulary
from llama_runtime.schema_rules import kept_schema

if TYPE_CHECKING:
    import llguidance

Masks = npt.NDArray[np.int32]

MAX_COMPILED = 128  # constraints that are kept, the latest ones
# Fuel and sizes that bound a token to some hundred milliseconds, and that no schema of the tests
# comes near. What compiling may take is bounded by ``grammar_check``.
INITIAL_LEXER_FUEL = 1_000_000
STEP_LEXER_FUEL = 200_000
STEP_MAX_ITEMS = 50_000
MAX_ITEMS_IN_ROW = 2_000
MAX_LEXER_STATES = 50_000
MAX_GRAMMAR_SIZE = 100_000
# Without a bound a model that doesn't know what to write next indents for ever.
WHITESPACE = r"[ \n\t]{1,32}"


class Matcher:
    """Where one completion is in its grammar.

    Args:
        state: of llguidance, this matcher's own.
        constraint: whose it is.
    """

    __slots__ = ("_constraint", "state")

    def __init__(self, state: llguidance.LLMatcher, constraint: Constraint) -> None:
        self.state = state
        self._constraint = constraint

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow any more."""
        return bool(self.state.is_stopped())

    def accept(self, token_id: int) -> None:
        """A token more, which the mask allowed.

        Raises:
            RequestError: the grammar needs more than its limits here.
        """
        if not self.state.consume_token(token_id):
            raise _refused(self._constraint, self.state.get_error())

    def end(self) -> None:
        """The completion ends here, which the mask allowed.

        Raises:
            RequestError: only because the grammar needed more than its limits.
        """
        if self.state.is_error():
            raise _refused(self._constraint, self.state.get_error())


class GrammarCompiler:
    """Compiles constraints for one vocabulary; safe to share between threads.

    Args:
        tokenizer: a ``tokenizer.json``, read when there is something to compile.
        vocab_size: V.
        eos_token_ids: tokens that end a completion whose grammar is satisfied.
    """

    def __init__(self, tokenizer: Path, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._path = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at its beginning; what has been compiled lately is there at once.

        Raises:
            RequestError: the constraint doesn't compile, or is too large; or no end token is known.
        """
        return Matcher(self._state(constraint).deep_copy(), constraint)

    def prepare(self, constraint: Constraint | None) -> None:
        """Compile a constraint, so that ``matcher`` doesn't hold up who calls it.

        Raises:
            RequestError: as ``matcher``.
        """
        if constraint is not None:
            self._state(constraint)

    def _state(self, constraint: Constraint) -> llguidance.LLMatcher:
        with self._lock:
            state = self._compiled.get(constraint)
            if state is not None:
                self._compiled.move_to_end(constraint)
                return state
            tokenizer = self._opened(constraint)
        state = _compile(tokenizer, constraint)
        with self._lock:
            self._compiled[constraint] = state
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return state

    def _opened(self, constraint: Constraint) -> llguidance.LLTokenizer:
        import llguidance

        if self._tokenizer is None:
            if not self._eos_token_ids:
                raise _refused(constraint, "the bundle names no token that ends a completion")
            vocabulary = GrammarVocabulary(self._path, self._vocab_size, self._eos_token_ids)
            wrapped = llguidance.TokenizerWrapper(vocabulary)
            self._tokenizer = llguidance.LLTokenizer(wrapped, eos_token=self._eos_token_ids)
        return self._tokenizer


class MaskFiller:
    """Computes the masks of many matchers side by side.

    Args:
        threads: of the computation.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor: llguidance.LLExecutor | None = None

    def fill(self, rows: Seq[tuple[int, Matcher, Seq[int]]], masks: Masks) -> None:
        """Write which tokens may come next.

        Where a matcher can't compute it within its limits, it is the end; ``Matcher.end`` says so.

        Args:
            rows: the row of a matcher, and guesses at its next tokens; the rows after that one
                take what may follow them, up to the first that isn't allowed.
            masks: [R, ceil(V / 32)], a bit a token, the lowest first; other rows stay as they are.
        """
        import llguidance

        if self._executor is None:
            self._executor = llguidance.LLExecutor(self._threads)
        place = masks.ctypes.data, masks.shape[1] * masks.itemsize, masks.shape[0]
        single = [(matcher.state, row) for row, matcher, draft in rows if not draft]
        guessed = [(matcher.state, row, list(draft)) for row, matcher, draft in rows if draft]
        if single:
            self._executor.unsafe_compute_mask_ptr(single, *place)
        if guessed:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(guessed, *place)


def mask_words(vocab_size: int) -> int:
    """The int32 numbers of one mask."""
    return -(-vocab_size // 32)


def forbid(logits: npt.NDArray[np.float32], mask: Masks) -> None:
    """Put tokens out of reach.

    Args:
        logits: [V], written into.
        mask: [ceil(V / 32)].
    """
    allowed = np.unpackbits(mask.view(np.uint8), bitorder="little", count=len(logits))
    np.copyto(logits, np.float32(-np.inf), where=allowed == 0)


def _compile(tokenizer: llguidance.LLTokenizer, constraint: Constraint) -> llguidance.LLMatcher:
    import llguidance

    try:
        grammar = _grammar(constraint)
    except ValueError as error:
        raise _refused(constraint, error) from error
    if not grammar_check.ends(grammar):
        raise _refused(constraint, grammar_check.OVER_LIMIT)
    limits = llguidance.LLParserLimits(
        max_items_in_row=MAX_ITEMS_IN_ROW,
        initial_lexer_fuel=INITIAL_LEXER_FUEL,
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SIZE,
        verbose_errors=False,  # else they carry the grammar
    )
    state = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not state.is_error():
        state.compute_bitmask()  # some circles show only here
    if state.is_error():
        raise _refused(constraint, state.get_error())
    warnings = state.get_grammar_warnings()
    if warnings:  # something of it would not be kept
        raise _refused(constraint, warnings[0])
    return state


def _grammar(constraint: Constraint) -> str:
    """A constraint in the language of llguidance.

    Raises:
        ValueError: a schema has a rule or a number that can't be kept.
    """
    import llguidance

    make, source = llguidance.LLMatcher, constraint.source
    if constraint.kind == "json_schema":
        schema = kept_schema(json.loads(source))
        return make.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE})
    if constraint.kind == "regex":
        # Classes such as \d are ASCII, as they are in JSON schemas.
        return make.grammar_from_lark(f"start: /{llguidance.regex_to_lark(source, 'dws')}/")
    if constraint.kind == "choice":
        texts = " | ".join(json.dumps(text) for text in json.loads(source))
        return make.grammar_from_lark(f"start: {texts}")
    return make.grammar_from_lark(source)


def _refused(constraint: Constraint, reason: object) -> RequestError:
    return RequestError(
        f"{constraint.kind} can't be used: {one_line(reason)}", param=constraint.kind
    )
