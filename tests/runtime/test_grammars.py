"""What a completion is held to, and the tokens that may come next."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from llama_runtime.detokenizer import TokenBytes
from llama_runtime.errors import RequestError
from llama_runtime.grammar_masks import MaskFiller, Masks, forbid, mask_words
from llama_runtime.grammars import MAX_COMPILED, GrammarCompiler, Matcher
from llama_runtime.params import SamplingParams

CONTROL = ("<|end|>", "<|begin|>")
TEXT = """{"name": "value", "list": [1, 2, 3], "truth": true, "nothing": null, "nested": {"a": "b"}}
The quick brown fox jumps over the lazy dog. 2024-11-03, 3.14159. Äpfel, Öl, Übung, 日本語 😀"""


def byte_level() -> Tokenizer:
    """A small vocabulary with tokens of several letters, digits and braces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=list(CONTROL), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """One with "▁" for a space and tokens for bytes, as Llama 2 has."""
    pieces = ["<unk>", *CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted(set(TEXT.replace(" ", "▁")) - {"\n"} - set("日本語😀"))
    pieces += [*letters, "ab", "▁the", "the", '":', '{"', "▁{", "12"]
    merges = [("a", "b"), ("t", "h"), ('"', ":"), ("{", '"'), ("▁", "{"), ("1", "2")]
    pieces += ["th"]
    merges += [("th", "e"), ("▁", "the")]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", *CONTROL)])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


class Vocabulary:
    """A compiler, and completions drawn at random from what it allows."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, padding: int = 100) -> None:
        path = folder / "tokenizer.json"
        tokenizer.save(str(path))
        self.tokenizer = tokenizer
        self.table = TokenBytes(tokenizer)
        self.size = len(self.table) + padding  # as models pad their embedding
        self.ends = {self.id_of(CONTROL[0])}
        self.compiler = GrammarCompiler(path, self.size, self.ends)

    def id_of(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        assert token_id is not None
        return token_id

    def matcher(self, **held: Any) -> Matcher:
        constraint = SamplingParams(**held).constraint
        assert constraint is not None
        return self.compiler.matcher(constraint)

    def allowed(self, matcher: Matcher) -> list[int]:
        masks: Masks = np.full((1, mask_words(self.size)), -1, np.int32)
        MaskFiller(1).fill([(0, matcher, ())], masks)
        row = np.zeros(self.size, np.float32)
        forbid(row, masks[0])
        return np.flatnonzero(row == 0).tolist()

    def walk(self, choose: random.Random, most: int = 200, **held: Any) -> bytes | None:
        """The text of a completion, ended as soon as it may; None if it isn't by then."""
        matcher, text = self.matcher(**held), b""
        for _ in range(most):
            tokens = self.allowed(matcher)
            if self.ends & {*tokens}:
                return text
            token = choose.choice(tokens)
            matcher.accept(token)
            text += self.table.bytes_of(token)
            if matcher.is_complete:
                return text
        return None


@pytest.fixture(scope="module", params=[byte_level, sentencepiece])
def vocabulary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Vocabulary:
    make: Callable[[], Tokenizer] = request.param
    return Vocabulary(make(), tmp_path_factory.mktemp("vocabulary"))


def test_a_token_is_the_bytes_that_the_detokenizer_writes(vocabulary: Vocabulary) -> None:
    assert vocabulary.size > len(vocabulary.table)  # as models pad their embedding
    vocabulary.compiler.prepare(SamplingParams(regex="a").constraint)
    assert vocabulary.compiler._opened is not None
    _, tokenizer = vocabulary.compiler._opened
    assert tokenizer.vocab_size == vocabulary.size
    for token_id in range(len(vocabulary.table)):
        written = vocabulary.table.bytes_of(token_id)
        if written == b"\xff":  # which no text has, and llguidance marks control tokens with
            assert not tokenizer.decode_bytes([token_id])
        elif written:
            assert tokenizer.decode_bytes([token_id]) == written
        else:
            assert tokenizer.is_special_token(token_id)
    anything = vocabulary.allowed(vocabulary.matcher(regex="(?s:.)*"))
    assert max(anything) < len(vocabulary.table)


@pytest.mark.parametrize(
    "pattern",
    [
        "a",
        r"[0-9]{4}-[0-9]{2}",
        "(yes|no|maybe)",
        r"a+b*c?d{2,3}",
        r"[^a-z]{3}",
        r"\d\d:\w\s",
        "é|日本語|😀",
        r"a/b\\\"\n",
        "line\nbreak",
        "(?i)abc",
        r"\{\"x\": [0-9]+\}",
    ],
)
def test_a_completion_matches_all_of_a_regular_expression(
    vocabulary: Vocabulary, pattern: str
) -> None:
    found = {vocabulary.walk(random.Random(i), regex=pattern) for i in range(20)}
    assert None not in found
    for text in found:
        assert re.fullmatch(pattern, (text or b"").decode("utf-8"), re.ASCII), text


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4), st.integers(0, 999))
@settings(max_examples=60)
def test_a_completion_is_one_of_the_choices(
    vocabularies: list[Vocabulary], choices: list[str], seed: int
) -> None:
    for one in vocabularies:
        text = one.walk(random.Random(seed), choice=choices)
        # A choice that begins another one may be ended where it ends.
        assert text is not None
        assert text.decode("utf-8") in choices


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> list[Vocabulary]:
    make = (byte_level, sentencepiece)
    return [Vocabulary(one(), tmp_path_factory.mktemp("vocabulary")) for one in make]


@pytest.mark.parametrize(
    "choices",
    [
        ['"', "\\", "/", "a\nb", "\t", "\x00", "\x7f"],
        ["i", '"i', "a | b", "#", "%json"],
        ["no"] * 3,
        ["▁", "a▁b"],
    ],
)
def test_every_choice_can_be_made(vocabulary: Vocabulary, choices: list[str]) -> None:
    found = {vocabulary.walk(random.Random(i), choice=choices) for i in range(60)}
    assert found == {text.encode() for text in choices}


def test_a_control_token_in_a_choice_is_text(vocabulary: Vocabulary) -> None:
    """A grammar can't be made to write the token: only the end, where it may end."""
    choices = [f"a{CONTROL[1]}b", CONTROL[0]]
    matcher = vocabulary.matcher(choice=choices)
    controls = {*map(vocabulary.id_of, CONTROL)}
    assert not controls & {*vocabulary.allowed(matcher)}
    assert {vocabulary.walk(random.Random(i), choice=choices) for i in range(20)} == {
        text.encode() for text in choices
    }


def test_any_json_is_json_and_the_end_comes_after_it(vocabulary: Vocabulary) -> None:
    finished = 0
    for i in range(40):
        text = vocabulary.walk(random.Random(i), json_schema={"type": ["object", "null", "number"]})
        if text is not None:
            json.loads(text)
            finished += 1
    assert finished > 5


def test_white_space_has_an_end(vocabulary: Vocabulary) -> None:
    """Else a model that doesn't know what to write next indents for ever."""
    matcher = vocabulary.matcher(json_schema=True)
    matcher.accept(vocabulary.id_of("["))
    space = next(i for i in range(vocabulary.size) if vocabulary.table.bytes_of(i) == b" ")
    for _ in range(100):
        if space not in vocabulary.allowed(matcher):
            return
        matcher.accept(space)
    pytest.fail("a hundred spaces, and still more may come")


@given(st.data())
@settings(max_examples=40)
def test_masks_of_guesses_are_those_of_the_tokens_one_by_one(
    vocabularies: list[Vocabulary], data: st.DataObject
) -> None:
    """Rows of several matchers in one go, up to the first guess that isn't allowed."""
    one = vocabularies[0]
    choose = random.Random(data.draw(st.integers(0, 10**6)))
    rows: list[tuple[int, Matcher, list[int]]] = []
    wanted: dict[int, list[int]] = {}
    place = data.draw(st.integers(0, 2))
    for _ in range(data.draw(st.integers(1, 4))):
        options = {"json_schema": {"type": "array"}, "regex": "([a-c]{2}[0-9])*x", "choice": ["ab"]}
        kind = choose.choice(sorted(options))
        matcher, alone = (one.matcher(**{kind: options[kind]}) for _ in range(2))
        draft: list[int] = []
        wanted[place] = one.allowed(alone)
        for i in range(choose.randint(0, 8)):
            tokens = [t for t in wanted[place + i] if t not in one.ends]
            if choose.random() < 0.1 or not tokens:
                draft += [choose.randrange(one.size) for _ in range(3)]
                break
            draft.append(choose.choice(tokens))
            alone.accept(draft[-1])
            if alone.is_complete:
                break
            wanted[place + i + 1] = one.allowed(alone)
        rows.append((place, matcher, draft))
        place += len(draft) + 1 + choose.randint(0, 2)
    masks: Masks = np.full((place, mask_words(one.size)), -1, np.int32)
    MaskFiller(2).fill(rows, masks)
    for row, tokens in wanted.items():
        bits = np.unpackbits(masks[row].view(np.uint8), bitorder="little", count=one.size)
        assert np.flatnonzero(bits).tolist() == tokens
    for place, matcher, _ in rows:  # which is where it was
        assert one.allowed(matcher) == wanted[place]


def test_copies_of_one_grammar_go_their_own_ways(vocabulary: Vocabulary) -> None:
    first, second = (vocabulary.matcher(regex="[ab]{3}c") for _ in range(2))
    before = vocabulary.allowed(second)
    first.accept(vocabulary.allowed(first)[0])
    assert vocabulary.allowed(second) == before
    assert vocabulary.allowed(vocabulary.matcher(regex="[ab]{3}c")) == before


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": "a{5"}, "repetition"),
        ({"grammar": "start: nobody"}, "nobody"),
        ({"grammar": "no grammar at all"}, "grammar"),
        ({"grammar": "begin: /a/"}, "start"),
        ({"json_schema": {"type": "strin"}}, "strin"),
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"json_schema": {"if": {}, "then": {}}}, "if"),
        ({"json_schema": {"$ref": "#/$defs/nobody"}}, "nobody"),
        ({"json_schema": {"$ref": "https://example.org/schema.json"}}, "retriev"),
        ({"json_schema": {"$ref": "file:///etc/passwd"}}, "retriev"),
        ({"json_schema": {"enum": []}}, "[Uu]nsatisfiable"),
        ({"json_schema": {"type": "string", "pattern": "["}}, "regex"),
        ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "[Uu]nsatisfiable"),
        ({"json_schema": {"$ref": "#"}}, "nothing satisfies it"),
        ({"grammar": '{"grammars": [{"json_schema": {"type": "integer"}}]}'}, "."),
        ({"json_schema": {"minimum": 10**400}}, "2.53"),
        ({"json_schema": {"type": "number", "multipleOf": 1_000_003}}, "more than 1 s, 512 MB or"),
    ],
)
def test_what_does_not_compile_is_refused_by_name(
    vocabulary: Vocabulary, held: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as refusal:
        vocabulary.matcher(**held)
    assert refusal.value.param in held
    assert str(refusal.value).startswith(f"{refusal.value.param} can't be used: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("token", ["<|begin|>", "<[300]>", "<|nobody|>"])
def test_a_grammar_that_names_a_control_token_is_looked_at_all_the_same(
    vocabulary: Vocabulary, token: str
) -> None:
    """What isn't in the vocabulary of the look would be refused there before it was compiled."""
    schema = '{"type": "integer", "multipleOf": 30000001}'
    started = time.monotonic()
    with pytest.raises(RequestError, match=r"^grammar can't be used"):
        vocabulary.matcher(grammar=f"start: {token} number\nnumber: %json {schema}")
    rules = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(3000))
    with pytest.raises(RequestError, match=r"^grammar can't be used"):
        vocabulary.matcher(grammar=f'start: {token} r0\n{rules}\nr3000: "a"')
    assert time.monotonic() - started < 10


def test_control_tokens_may_be_named(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.matcher(grammar=f'start: "a" {CONTROL[1]} "b"')
    matcher.accept(vocabulary.id_of("a"))
    assert vocabulary.allowed(matcher) == [vocabulary.id_of(CONTROL[1])]


def test_a_vocabulary_that_grammars_cannot_use_is_an_error_of_the_request(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("x" * 5000, special=False)])
    vocabulary = Vocabulary(tokenizer, tmp_path)
    with pytest.raises(RequestError, match="the vocabulary can't be read for grammars"):
        vocabulary.matcher(regex="a")
    ends = [*vocabulary.ends, 10**6]  # which the model can't have
    GrammarCompiler(Path(write(byte_level(), tmp_path)), vocabulary.size, ends).prepare(
        SamplingParams(regex="a").constraint
    )


def write(tokenizer: Tokenizer, folder: Path) -> Path:
    path = folder / "other.json"
    tokenizer.save(str(path))
    return path


def test_a_bundle_without_an_end_token_says_so(tmp_path: Path) -> None:
    vocabulary = Vocabulary(byte_level(), tmp_path)
    compiler = GrammarCompiler(tmp_path / "tokenizer.json", vocabulary.size, ())
    constraint = SamplingParams(regex="a").constraint
    with pytest.raises(RequestError, match="names no token that ends a completion"):
        compiler.prepare(constraint)


def test_a_token_that_is_not_allowed_ends_the_matcher(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.matcher(regex="aaa")
    wrong = vocabulary.id_of("9")
    with pytest.raises(RequestError, match="regex can't be used"):
        matcher.accept(wrong)
    # A mask that can't be had allows the end alone, which then is none.
    assert {*vocabulary.allowed(matcher)} == vocabulary.ends
    with pytest.raises(RequestError, match="regex can't be used"):
        matcher.end()


def test_the_latest_grammars_are_kept(tmp_path: Path) -> None:
    compiler = Vocabulary(byte_level(), tmp_path).compiler
    constraints = [SamplingParams(choice=(str(i),)).constraint for i in range(MAX_COMPILED + 5)]
    for constraint in constraints:
        compiler.prepare(constraint)
        compiler.prepare(constraints[0])
    assert len(compiler._compiled) == MAX_COMPILED
    assert {constraints[0], constraints[-1]} <= {*compiler._compiled}
    assert constraints[1] not in compiler._compiled


def test_threads_may_compile_at_once(tmp_path: Path) -> None:
    vocabulary = Vocabulary(byte_level(), tmp_path)
    found: list[bytes | None] = []

    def work(seed: int) -> None:
        found.append(vocabulary.walk(random.Random(seed), choice=[f"{i}!" for i in range(50)]))

    threads = [Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert None not in found


def test_what_would_be_kept_in_part_is_refused(vocabulary: Vocabulary) -> None:
    """A grammar may ask for that; here it would give what its schema doesn't allow."""
    schema = '{"type": "string", "format": "zip", "x-guidance": {"lenient": true}}'
    with pytest.raises(RequestError, match="Unknown format: zip"):
        vocabulary.matcher(grammar=f"start: %json {schema}")
