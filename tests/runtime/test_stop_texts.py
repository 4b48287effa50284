"""Stop texts: found in the text wherever tokens' borders lie, and never shown in part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llama_runtime.completion import Completion
from llama_runtime.detokenizer import TokenBytes
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.sequence import Sequence
from llama_runtime.slots_engine import slots_engine
from llama_runtime.step_batch import Step
from llama_runtime.stop_texts import StopTexts

EOS, BYTES_FROM, VOCAB_SIZE = 2, 3, 259
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Ο ήλιος ανατέλλει πάνω από τη θάλασσα.",
    "Съешь же ещё этих мягких французских булок.",
    "עטלף אבק נס דרך מזגן שהתפוצץ כי חם.",
    "نص حكيم له سر قاطع وذو شأن عظيم.",
    "ऋषियों को सताने वाले दुष्ट राक्षसों का राजा।",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "天地玄黃，宇宙洪荒。日月盈昃，辰宿列張。",
    "いろはにほへと ちりぬるを わがよたれそ",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "ვეფხისტყაოსანი შოთა რუსთაველისა.",
    "A family 👨‍👩‍👧‍👦, a flag 🏳️‍🌈, a wave 👋🏽, e\u0301 and nothing.",
]

letters = st.text("ab", max_size=24)
texts = letters | st.sampled_from(SENTENCES) | st.text(max_size=24)


@st.composite
def split(draw: st.DrawFn, text: str) -> list[str]:
    """The text in pieces, some of them empty."""
    borders = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in itertools.pairwise([0, *borders, len(text)])]


@st.composite
def stops_for(draw: st.DrawFn, text: str) -> list[str]:
    """Some that are in the text, or nearly, and some that may be."""
    found = draw(st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
    for _ in range(draw(st.integers(0, 3)) if text else 0):
        start = draw(st.integers(0, len(text) - 1))
        part = text[start : start + draw(st.integers(1, 6))]
        found.append(part + draw(st.sampled_from(["", "", "x"])))
    return found


def expected(pieces: Iterable[tuple[str, bool]], stops: Seq[str], include: bool) -> Any:
    """What is given out in the end, and what ended it, looked for after each character."""
    seen = ""
    for piece, may_stop in pieces:
        for character in piece:
            seen += character
            # Of several that end here, the longest begins first.
            ends = [s for s in stops if seen.endswith(s)] if may_stop else []
            if ends:
                found = max(ends, key=len)
                return seen if include else seen[: -len(found)], found
    return seen, None


def given_out(pieces: Iterable[tuple[str, bool]], stops: Seq[str], include: bool) -> list[str]:
    """What each push gives out and, unless a stop text ended it, what was still held back."""
    watch, shown = StopTexts(stops, include=include), []
    for text, may_stop in pieces:
        shown.append(watch.push(text, may_stop=may_stop))
        if watch.found is not None:
            return [*shown, watch.found]
    return [*shown, watch.finish(), ""]


@given(st.data(), st.booleans())
def test_where_the_borders_lie_never_shows(data: st.DataObject, include: bool) -> None:
    text = data.draw(texts)
    stops = data.draw(stops_for(text))
    whole, found = expected([(text, True)], stops, include)
    for _ in range(3):
        pieces = [(piece, True) for piece in data.draw(split(text))]
        *shown, ended_by = given_out(pieces, stops, include)
        assert "".join(shown) == whole
        assert ended_by == (found or "")


@given(st.data(), st.booleans())
def test_a_stop_text_before_min_tokens_is_text_as_any_other(
    data: st.DataObject, include: bool
) -> None:
    text = data.draw(texts)
    stops, pieces = data.draw(stops_for(text)), data.draw(split(text))
    free = data.draw(st.integers(0, len(pieces)))  # pushes that can't stop
    flagged = [(piece, i >= free) for i, piece in enumerate(pieces)]
    *shown, ended_by = given_out(flagged, stops, include)
    assert ("".join(shown), ended_by or None) == expected(flagged, stops, include)


@given(st.data(), st.booleans())
def test_nothing_of_a_stop_text_and_nothing_after_it_leaks(
    data: st.DataObject, include: bool
) -> None:
    text = data.draw(texts)
    stops = data.draw(stops_for(text))
    *shown, ended_by = given_out(
        [(piece, True) for piece in data.draw(split(text))], stops, include
    )
    out = "".join(shown)
    assert text.startswith(out)
    if not ended_by:
        assert out == text
        assert not any(stop in text for stop in stops)
    elif include:
        assert out.endswith(ended_by)
        assert not any(stop in out[:-1] for stop in stops)
    else:
        assert text.startswith(out + ended_by)
        assert not any(stop in out for stop in stops)


@given(st.data())
def test_no_more_is_held_back_than_could_become_a_stop_text(data: st.DataObject) -> None:
    text = data.draw(texts)
    stops, shown, seen = data.draw(stops_for(text)), "", ""
    watch = StopTexts(stops)
    for piece in data.draw(split(text)):
        shown += watch.push(piece)
        if watch.found is not None:
            return
        seen += piece
        held = seen.removeprefix(shown)
        assert shown + held == seen
        assert not held or any(stop.startswith(held) for stop in stops)
        assert not any(seen.endswith(stop[:n]) for stop in stops for n in range(len(held) + 1, 300))


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "found"),
    [
        (["abab"], ["ab", "aab", "ab", "x"], "aba", "abab"),
        (["ab", "b"], ["x", "a", "b"], "x", "ab"),
        (["b", "ab"], ["xa", "b"], "x", "ab"),
        (["abc", "b"], ["abc"], "a", "b"),
        (["aa"], ["aaa"], "", "aa"),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", "\n\n"),
        (["stop"], ["sto", "sto", "p"], "sto", "stop"),
        (["👨‍👩‍👧"], ["👨\u200d", "👩\u200d👧\u200d👦"], "", "👨‍👩‍👧"),
        (["e"], ["e\u0301"], "", "e"),
        (["ü"], ["u\u0308"], "u\u0308", ""),
        ([], ["any", "thing"], "anything", ""),
    ],
)
def test_examples(stops: list[str], pieces: list[str], shown: str, found: str) -> None:
    *out, ended_by = given_out([(piece, True) for piece in pieces], stops, include=False)
    assert ("".join(out), ended_by) == (shown, found)


# --- through the engine -------------------------------------------------------------------------


class Speaker:
    """A backend that says given tokens, whatever the prompt."""

    row_multiple = 1

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    def run(self, step: Step) -> Any:
        logits = np.zeros((len(step.logits_rows), VOCAB_SIZE), np.float32)
        for row, chunk in zip(logits, step.chunks, strict=False):
            row[self._token_ids[chunk.seq.num_completion_tokens]] = 50
        return logits

    def clean(self, slot: int, num_tokens: int) -> None: ...

    def save_block(self, slot: int, start: int, block: int) -> None: ...

    def load_block(self, slot: int, start: int, block: int) -> None: ...

    def close(self) -> None: ...


Say = Callable[..., tuple[Completion, list[TokenEvent]]]


@pytest.fixture(scope="module")
def table(byte_tokenizer: tokenizers.Tokenizer) -> TokenBytes:
    return TokenBytes(byte_tokenizer)


@pytest.fixture
def say(table: TokenBytes) -> Say:
    """Run a completion whose bytes are told, a token each, an end token after them."""
    ids = {table.bytes_of(i): i for i in range(BYTES_FROM, len(table))}

    def say(data: bytes, **options: Any) -> tuple[Completion, list[TokenEvent]]:
        spoken = [ids[bytes([value])] for value in data] + [EOS]
        engine = slots_engine(
            Speaker(spoken),
            table,
            [EOS],
            vocab_size=VOCAB_SIZE,
            max_batch=1,
            max_len=400,
            prompt_budget=64,
            max_chunk=64,
        )
        seq: Sequence = engine.add([5], SamplingParams(**{"max_tokens": 300, **options}))
        events = []
        while engine.has_work:
            events += engine.step()
        return Completion.of(seq, "".join(event.text for event in events), events[-1]), events

    return say


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_stop_text_is_found_across_the_borders_of_tokens(
    say: Say, sentence: str, include: bool
) -> None:
    for start in (0, 3, len(sentence) - 4):
        stop = sentence[start : start + 4]
        completion, events = say(sentence.encode(), stop=["~~", stop], include_stop=include)
        at = sentence.index(stop)
        assert completion.text == sentence[: at + 4 * include]
        assert (completion.finish_reason, completion.stop_text) == ("stop", stop)
        assert len(completion.token_ids) == len(sentence[: at + 4].encode())
        shown = [*itertools.accumulate(event.text for event in events)]
        assert all(not stop.startswith(part[at:]) or part[at:] == "" for part in shown[:-1])


def test_without_a_match_the_text_is_whole(say: Say) -> None:
    for sentence in SENTENCES:
        completion, _ = say(sentence.encode(), stop=[sentence[-3:] + "!", "~~"])
        assert (completion.text, completion.finish_reason) == (sentence, "stop")
        assert completion.stop_text is None
        assert completion.token_ids[-1] == EOS


@pytest.mark.parametrize(
    ("data", "options", "text", "reason", "found"),
    [
        # What was held back is given out where something else ends it.
        (b"hello st", {"stop": "stop"}, "hello st", "stop", None),
        (b"hello stop", {"stop": "stop", "max_tokens": 9}, "hello sto", "length", None),
        (b"hello stop", {"stop": "stop", "max_tokens": 10}, "hello ", "stop", "stop"),
        # Half a character at the end is U+FFFD, which a stop text may hold.
        (b"abc\xf0\x9f", {"stop": "x"}, "abc\ufffd", "stop", None),
        (b"abc\xf0\x9f", {"stop": "c\ufffd"}, "ab", "stop", "c\ufffd"),
        (b"abc\xf0\x9f.", {"stop": "c\ufffd", "max_tokens": 5}, "ab", "stop", "c\ufffd"),
        (b"abc\xff.", {"stop": "\ufffd."}, "abc", "stop", "\ufffd."),
        (b"abc\xff.", {"stop": "\ufffd", "include_stop": True}, "abc\ufffd", "stop", "\ufffd"),
        (b"ab\xff", {"stop": "b\ufffdc"}, "ab\ufffd", "stop", None),
        # A stop text counts from the token on that comes after min_tokens others.
        (b"aXbX", {"stop": "X", "min_tokens": 1}, "a", "stop", "X"),
        (b"aXbX", {"stop": "X", "min_tokens": 2}, "aXb", "stop", "X"),
        (b"aXYbXY", {"stop": "XY", "min_tokens": 2}, "a", "stop", "XY"),
        (b"aXYbXY", {"stop": "XY", "min_tokens": 3}, "aXYb", "stop", "XY"),
        (b"aXbXc", {"stop": "X", "min_tokens": 4}, "aXbXc", "stop", None),
    ],
)
def test_ends(
    say: Say, data: bytes, options: dict[str, Any], text: str, reason: str, found: str | None
) -> None:
    completion, _ = say(data, **options)
    assert (completion.text, completion.finish_reason) == (text, reason)
    assert completion.stop_text == found
