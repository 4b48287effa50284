"""From what a completion is held to, to where it is in its grammar.

``llguidance`` compiles a constraint against the vocabulary and follows a completion as it grows;
``grammar_masks`` asks it which tokens may come next. It needs no torch, holds no lock of Python
while it computes, and is imported with the first constraint.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from llama_runtime import grammar_check
from llama_runtime.constraints import Constraint
from llama_runtime.errors import CaravanError, RequestError, one_line, rust_reason
from llama_runtime.grammar_vocabulary import GrammarVocabulary
from llama_runtime.schema_rules import kept_schema

if TYPE_CHECKING:
    import llguidance

MAX_RENEWALS = 3  # of one completion, which after that is believed to be at fault
MAX_COMPILED = 128  # constraints that are kept, the latest ones
# Fuel and sizes that bound a token to some hundred milliseconds, and that no schema of the tests
# comes near. What compiling may take is bounded by ``grammar_check``.
INITIAL_LEXER_FUEL = 1_000_000
STEP_LEXER_FUEL = 200_000
STEP_MAX_ITEMS = 50_000
MAX_ITEMS_IN_ROW = 2_000
MAX_LEXER_STATES = 50_000
MAX_GRAMMAR_SIZE = 100_000
# Of what llguidance says: a listing of the grammar, a place in it, an option that isn't there here.
_LISTING = re.compile(r"\n +\d+ \|.*", re.DOTALL)
_PLACE = re.compile(r"^at \d+\(\d+\): |\(in regex\): ")
_NO_OPTION = re.compile(r"[.;,]? ?Enable 'coerce_one_of'.*")
# Without a bound a model that doesn't know what to write next indents for ever.
WHITESPACE = r"[ \n\t]{1,32}"


class Matcher:
    """Where one completion is in its grammar.

    States of one grammar share a part of llguidance's memory, which breaks for all of them when one
    needs more than the limits. So a state that fails is made anew, and the completion is at fault
    only if that one fails too.

    Args:
        state: of llguidance.
        constraint: whose it is.
        renew: makes another one at the beginning, which shares nothing.
    """

    __slots__ = ("_constraint", "_num_renewals", "_renew", "_token_ids", "state")

    def __init__(
        self,
        state: llguidance.LLMatcher,
        constraint: Constraint,
        renew: Callable[[Constraint], llguidance.LLMatcher],
    ) -> None:
        self.state = state
        self._constraint = constraint
        self._renew = renew
        self._token_ids: list[int] = []
        self._num_renewals = 0

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow any more."""
        return bool(self.state.is_stopped())

    def accept(self, token_id: int) -> None:
        """A token more, which the mask allowed.

        Raises:
            RequestError: the grammar needs more than its limits here.
        """
        self._token_ids.append(token_id)
        if not self.state.consume_token(token_id):
            self.recover()

    def recover(self) -> None:
        """Go on with another state, because this one has failed.

        Raises:
            RequestError: the other one fails too, or it is one too many.
        """
        reason = self.state.get_error()
        self._num_renewals += 1
        if self._num_renewals <= MAX_RENEWALS:
            self.state = self._renew(self._constraint)
            if self.state.consume_tokens(self._token_ids):
                return
        raise _refused(self._constraint, reason)

    def end(self) -> None:
        """The completion ends here.

        Raises:
            RequestError: it may not: a mask that needed more than its limits allows nothing else.
        """
        if not self.state.is_accepting():
            raise _refused(self._constraint, self.state.get_error() or "it needs too much here")


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
        self._eos_token_ids = sorted(i for i in eos_token_ids if i < vocab_size)
        self._opened: tuple[GrammarVocabulary, llguidance.LLTokenizer] | None = None
        self._compiled: OrderedDict[Constraint, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, constraint: Constraint) -> Matcher:
        """A matcher at its beginning; what has been compiled lately is there at once.

        Raises:
            RequestError: the constraint doesn't compile, or is too large; or no end token is known.
        """
        return Matcher(self._state(constraint).deep_copy(), constraint, self._renewed)

    def prepare(self, constraint: Constraint | None) -> None:
        """Compile a constraint, so that ``matcher`` doesn't hold up who calls it.

        Raises:
            RequestError: as ``matcher``.
        """
        if constraint is not None:
            self._state(constraint)

    def _renewed(self, constraint: Constraint) -> llguidance.LLMatcher:
        """A state of a grammar that has been compiled before, and failed since."""
        with self._lock:
            self._compiled.pop(constraint, None)
            vocabulary, tokenizer = self._open(constraint)
        return _compile(vocabulary, tokenizer, constraint)

    def _state(self, constraint: Constraint) -> llguidance.LLMatcher:
        with self._lock:
            state = self._compiled.get(constraint)
            if state is not None:
                self._compiled.move_to_end(constraint)
                return state
            vocabulary, tokenizer = self._open(constraint)
        state = _compile(vocabulary, tokenizer, constraint)
        with self._lock:
            self._compiled[constraint] = state
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return state

    def _open(self, constraint: Constraint) -> tuple[GrammarVocabulary, llguidance.LLTokenizer]:
        import llguidance

        if self._opened is None:
            if not self._eos_token_ids:
                raise _refused(constraint, "the bundle names no token that ends a completion")
            try:
                vocabulary = GrammarVocabulary(self._path, self._vocab_size, self._eos_token_ids)
                wrapped = llguidance.TokenizerWrapper(vocabulary)
                tokenizer = llguidance.LLTokenizer(wrapped, eos_token=self._eos_token_ids)
            except BaseException as error:
                reason = f"the vocabulary can't be read for grammars: {rust_reason(error)}"
                raise _refused(constraint, reason) from error
            self._opened = vocabulary, tokenizer
        return self._opened


def _compile(
    vocabulary: GrammarVocabulary, tokenizer: llguidance.LLTokenizer, constraint: Constraint
) -> llguidance.LLMatcher:
    import llguidance

    try:
        grammar = _grammar(constraint)
    except ValueError as error:
        raise _refused(constraint, error) from error
    try:
        problem = grammar_check.problem_with(grammar, vocabulary.size, vocabulary.control_tokens)
    except CaravanError as error:
        raise _refused(constraint, error) from error
    if problem is not None:
        raise _refused(constraint, problem)
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

    source = constraint.source
    if constraint.kind == "json_schema":
        schema = kept_schema(json.loads(source))
        return llguidance.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": WHITESPACE}
        )
    if constraint.kind == "regex":
        # Classes such as \d are ASCII, as they are in JSON schemas.
        return _lark(f"start: /{llguidance.regex_to_lark(source, 'dws')}/")
    if constraint.kind == "choice":
        return _lark("start: " + " | ".join(json.dumps(text) for text in json.loads(source)))
    return _lark(source)


def _lark(source: str) -> str:
    """Lark, also where it begins like the form that llguidance keeps grammars in."""
    return json.dumps({"grammars": [{"lark_grammar": source}]})


def _refused(constraint: Constraint, reason: object) -> RequestError:
    """The error that says so, in words that are about what the caller wrote."""
    said = _LISTING.sub("", str(reason).replace("<non-verbose/>", ""))
    if constraint.kind != "grammar":  # else the place is one in the caller's own text
        said = _PLACE.sub("", said)
    said = one_line(_NO_OPTION.sub("", said).replace("NoExtensionBias", "nothing satisfies it"))
    return RequestError(f"{constraint.kind} can't be used: {said}", param=constraint.kind)
