"""Completions that are held to something, beside others that aren't, on engines of every kind.

On the CPU ``test_sampling_laws`` and ``test_company`` have them among their requests. Here are
engines whose steps overlap, where a step must not be planned before a grammar has heard the last
token, and the rest of what a caller may rely on.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llama_runtime.backends.fake import Fake
from llama_runtime.contract import MIN_CHUNK, cache_capacity
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.engine import Engine
from llama_runtime.errors import RequestError
from llama_runtime.events import TokenEvent
from llama_runtime.grammar_masks import MaskFiller, Masks, mask_words
from llama_runtime.grammars import GrammarCompiler, Matcher
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.slots_engine import slots_engine
from tests.paged_engine import paged_engine
from tests.recorded_engine import VOCAB_SIZE
from tests.tiny_model import byte_level_tokenizer

TABLE = TokenBytes(byte_level_tokenizer())
MAX_LEN = 128
END_TOKENS = frozenset({1, 2})  # which have no bytes
HELD: list[tuple[dict[str, Any], Callable[[str], object]]] = [
    ({"json_schema": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}}, json.loads),
    ({"regex": "([a-c]{2}[0-9]){2,4}x"}, re.compile("([a-c]{2}[0-9]){2,4}x").fullmatch),
    ({"choice": ["red", "green", "blue"]}, ["red", "green", "blue"].index),
    ({"grammar": 'start: "(" start ")" | "x"'}, re.compile(r"\(*x\)*").fullmatch),
]


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    path = tmp_path_factory.mktemp("grammars") / "tokenizer.json"
    byte_level_tokenizer().save(str(path))
    return GrammarCompiler(path, VOCAB_SIZE, END_TOKENS)


def requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Every second one is held to something."""
    choose, several = random.Random(seed), []
    for i in range(count):
        held = choose.choice(HELD)[0] if i % 2 else {}
        params = SamplingParams(
            max_tokens=choose.randint(5, 60),
            temperature=choose.choice([0.0, 1.0, 3.0]),
            top_k=choose.choice([0, 4]),
            seed=choose.randrange(5),
            ignore_eos=not held,
            logprobs=choose.random() < 0.3,
            **held,
        )
        prompt = [choose.randrange(256) for _ in range(choose.randint(1, 40))]
        several.append((prompt, params))
    return several


def slots(grammars: GrammarCompiler | None) -> Engine:
    return slots_engine(
        Fake(1, cache_capacity(MAX_LEN, MIN_CHUNK), VOCAB_SIZE),
        TABLE,
        END_TOKENS,
        vocab_size=VOCAB_SIZE,
        max_batch=1,
        max_len=MAX_LEN,
        prompt_budget=MIN_CHUNK,
        max_chunk=MIN_CHUNK,
        grammars=grammars,
    )


def finished(engine: Engine, events: list[TokenEvent]) -> None:
    while engine.has_work:
        events += engine.step()
        engine.check()


def told(seq: Sequence, events: list[TokenEvent]) -> tuple[Any, ...]:
    text = "".join(event.text for event in events if event.sequence_id == seq.id)
    return seq.completion_token_ids, text, seq.finish_reason, seq.logprobs


@pytest.mark.parametrize("seed", range(6))
def test_steps_that_overlap_give_what_single_steps_give(
    seed: int, grammars: GrammarCompiler
) -> None:
    asked = requests(seed, 24)
    engine, _, _ = paged_engine(
        TABLE,
        END_TOKENS,
        vocab_size=VOCAB_SIZE,
        max_batch=5,
        max_len=MAX_LEN,
        num_blocks=5 * MAX_LEN // 4,
        grammars=grammars,
    )
    events: list[TokenEvent] = []
    seqs = [engine.add(*request) for request in asked]
    engine.abort(seqs[3].id)
    finished(engine, events)
    for i, (request, seq) in enumerate(zip(asked, seqs, strict=True)):
        if i != 3:
            alone = slots(grammars)
            own: list[TokenEvent] = []
            single = alone.add(*request)
            finished(alone, own)
            assert told(seq, events) == told(single, own), request


def test_free_completions_still_overlap(grammars: GrammarCompiler) -> None:
    """A step waits for the one before it only if that decides what a grammar allows."""
    engine, runner, _ = paged_engine(
        TABLE,
        END_TOKENS,
        vocab_size=VOCAB_SIZE,
        max_batch=2,
        max_len=MAX_LEN,
        num_blocks=2 * MAX_LEN // 4,
        grammars=grammars,
    )
    engine.add([1], SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in range(10):
        engine.step()
        assert len(engine._in_flight) == 1  # queued before the one that was told
    engine.add([1], SamplingParams(max_tokens=30, regex="[a-c]{30}"))
    for _ in range(5):  # which runs its prompt too
        engine.step()
    before = runner.num_launched
    for _ in range(20):
        engine.step()
    assert runner.num_launched == before + 10  # one step to launch, one to collect
    finished(engine, [])


@pytest.mark.parametrize("speculation", ["off", "on"])
def test_what_ends_is_as_it_should_be(speculation: Any, grammars: GrammarCompiler) -> None:
    ended = 0
    for i in range(60):
        held, check = HELD[i % 4]
        params = SamplingParams(
            max_tokens=80, temperature=2.0, seed=i, speculation=speculation, **held
        )
        engine, events = slots(grammars), list[TokenEvent]()
        seq = engine.add([65 + i], params)
        finished(engine, events)
        _, text, reason, _ = told(seq, events)
        if reason == "stop":
            ended += 1
            check(text)
            assert check(text) is not None
        else:
            assert seq.num_completion_tokens == 80
    assert ended > 30


def test_the_last_token_of_a_grammar_ends_it_even_at_the_limit(grammars: GrammarCompiler) -> None:
    """What is whole isn't called cut off, and no token is spent on saying that it ends."""
    engine, events = slots(grammars), list[TokenEvent]()
    seq = engine.add([1], SamplingParams(max_tokens=3, choice=("red",)))
    finished(engine, events)
    assert told(seq, events)[1:3] == ("red", "stop")
    assert seq.num_completion_tokens == 3
    seq = engine.add([1], SamplingParams(max_tokens=2, choice=("red",)))
    finished(engine, events)
    assert told(seq, events)[1:3] == ("re", "length")


def test_stop_texts_and_stop_tokens_end_it_before(grammars: GrammarCompiler) -> None:
    engine, events = slots(grammars), list[TokenEvent]()
    last = byte_level_tokenizer().token_to_id("d")
    assert last is not None
    seq = engine.add([1], SamplingParams(max_tokens=9, choice=("red, green",), stop=(", ",)))
    other = engine.add(
        [1], SamplingParams(max_tokens=9, choice=("reds",), stop_token_ids=frozenset({last}))
    )
    finished(engine, events)
    assert told(seq, events)[1:3] == ("red", "stop")
    assert told(other, events)[2] == "stop"


def test_a_grammar_that_is_too_much_ends_its_own_completion(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error names the parameter, and the others go on."""
    monkeypatch.setattr("llama_runtime.grammars.STEP_LEXER_FUEL", 60)
    small = GrammarCompiler(grammars._path, VOCAB_SIZE, END_TOKENS)
    engine, _, _ = paged_engine(
        TABLE,
        END_TOKENS,
        vocab_size=VOCAB_SIZE,
        max_batch=3,
        max_len=MAX_LEN,
        num_blocks=3 * MAX_LEN // 4,
        grammars=small,
    )
    free = engine.add([1, 2], SamplingParams(max_tokens=20, ignore_eos=True))
    heavy = engine.add([1], SamplingParams(max_tokens=80, regex="(.{1,30}[a-z]{3,20}){1,9}end"))
    events: list[TokenEvent] = []
    finished(engine, events)
    (last,) = [event for event in events if event.sequence_id == heavy.id and event.finish_reason]
    assert last.finish_reason == "error"
    assert isinstance(last.error, RequestError)
    assert last.error.param == "regex"
    assert (free.finish_reason, free.num_completion_tokens) == ("length", 20)
    assert engine.failure is None


def test_what_is_too_much_for_one_completion_harms_no_other_of_its_grammar(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one that only guessed it: states of a grammar share what its limits are counted by."""
    monkeypatch.setattr("llama_runtime.grammars.STEP_LEXER_FUEL", 300)
    small = GrammarCompiler(grammars._path, VOCAB_SIZE, END_TOKENS)
    constraint = SamplingParams(regex="(ab){3,9}x(.{1,30}[a-z]{3,20}){1,9}end").constraint
    assert constraint is not None
    token_ids = [byte_level_tokenizer().token_to_id(letter) or 0 for letter in "abababxabcabc"]
    masks: Masks = np.full((20, mask_words(VOCAB_SIZE)), -1, np.int32)
    filler = MaskFiller(1)

    def goes(matcher: Matcher) -> None:
        for token_id in token_ids[:6]:
            filler.fill([(0, matcher, ())], masks)
            matcher.accept(token_id)

    before, guesses = small.matcher(constraint), small.matcher(constraint)
    filler.fill([(0, guesses, token_ids)], masks)
    broken = before.state.deep_copy()
    broken.compute_bitmask()
    assert not broken.consume_token(token_ids[0])  # or there is nothing to prove
    for matcher in (before, guesses, small.matcher(constraint)):
        goes(matcher)
    assert guesses.is_complete is False


def test_masks_are_there_when_no_thread_can_begin_any_more(grammars: GrammarCompiler) -> None:
    """As in a thread that goes on while the program ends."""
    engine, events = slots(grammars), list[TokenEvent]()
    runner: Any = engine._runner
    runner._masks._pool.shutdown()
    seq = engine.add([1], SamplingParams(max_tokens=9, choice=("red",)))
    finished(engine, events)
    assert told(seq, events)[1:3] == ("red", "stop")


def test_an_engine_without_a_tokenizer_says_so() -> None:
    with pytest.raises(RequestError, match="regex needs an engine"):
        slots(None).add([1], SamplingParams(max_tokens=9, regex="a"))
