"""Files in ShareGPT's form, among them those that aren't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_runtime.bench.lengths import Lengths
from llama_runtime.bench.sharegpt import Talk, read_sharegpt
from llama_runtime.bench.workload import from_talks, synthetic
from llama_runtime.errors import RequestError


def turn(who: object, value: object) -> dict[str, object]:
    return {"from": who, "value": value}


GOOD = {"id": "1", "conversations": [turn("human", "Why?"), turn("gpt", "So."), turn("human", "?")]}


def written(folder: Path, found: object) -> Path:
    path = folder / "talks.json"
    path.write_bytes(found if isinstance(found, bytes) else json.dumps(found).encode())
    return path


def test_the_first_question_and_its_answer_are_taken(tmp_path: Path) -> None:
    other = {"conversations": [turn("user", "a"), turn("assistant", "b")]}
    assert read_sharegpt(written(tmp_path, [GOOD, other])) == [Talk("Why?", "So."), Talk("a", "b")]


@pytest.mark.parametrize(
    "broken",
    [
        {"conversations": []},
        {"conversations": [turn("gpt", "a"), turn("human", "b")]},
        {"conversations": [turn("human", "a")]},
        {"conversations": [turn("human", " "), turn("gpt", "b")]},
        {"conversations": [turn("human", "a"), turn("gpt", None)]},
        {"conversations": [turn("human", "\ud800"), turn("gpt", "b")]},
        {"conversations": [turn([], "a"), turn("gpt", "b")]},
        {"conversations": "text"},
        {},
        "text",
        None,
    ],
)
def test_what_is_no_such_conversation_is_passed_over(tmp_path: Path, broken: object) -> None:
    assert read_sharegpt(written(tmp_path, [broken, GOOD])) == [Talk("Why?", "So.")]
    with pytest.raises(RequestError, match="no conversation that begins with a question"):
        read_sharegpt(written(tmp_path, [broken]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is no JSON: Expecting value"),
        (b'[{"conversations": [', "is no JSON"),
        (b"\xff\xfe\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"conversations": []}', "must be a list"),
        (b"[]", "no conversation"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as error:
        read_sharegpt(written(tmp_path, data))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no\.json can't be read"):
        read_sharegpt(tmp_path / "no.json")


def test_requests_have_the_lengths_of_the_talks_and_too_long_ones_are_passed_over() -> None:
    talks = [Talk("x" * n, "y" * (n + 1)) for n in range(1, 40)]

    def encode(text: str) -> list[int]:
        return [ord(char) for char in text]

    found = from_talks(talks, encode, None, 13, seed=1, max_len=33)
    pairs = {(len(ask.prompt), ask.output_len) for ask in found.asks}
    assert pairs == {(n, n + 1) for n in range(4, 17)}  # 13 that have 4 and fit
    assert found == from_talks(talks, encode, None, 13, seed=1, max_len=33)
    assert found != from_talks(talks, encode, None, 13, seed=2, max_len=33)
    fixed = from_talks(talks, encode, Lengths(2, 2), 5, seed=1, max_len=33)
    assert {ask.output_len for ask in fixed.asks} == {2}
    with pytest.raises(RequestError, match="13 of the file's 39 conversations"):
        from_talks(talks, encode, None, 14, seed=1, max_len=33)


def test_made_up_requests_keep_their_lengths_and_depend_on_the_seed_alone() -> None:
    found = synthetic(50, Lengths(3, 9), Lengths(2, 2), 200, seed=7)
    assert {len(ask.prompt) for ask in found.asks} == set(range(3, 10))
    assert {ask.output_len for ask in found.asks} == {2}
    ids = {token for ask in found.asks for token in ask.prompt}
    assert ids == set(range(50))
    assert found == synthetic(50, Lengths(3, 9), Lengths(2, 2), 200, seed=7)
    assert found != synthetic(50, Lengths(3, 9), Lengths(2, 2), 200, seed=8)


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "9:3", "a", "1:", ":2", "1:2:3", "²"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no whole number|rise from 1"):
        Lengths.parse(text)
