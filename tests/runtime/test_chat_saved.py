"""Conversations in files, and parameters on the fly: what comes back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from llama_runtime.chat import saved
from llama_runtime.chat.conversation import Conversation
from llama_runtime.chat.parameters import GIVEN_AT_START, POINTLESS, SETTABLE, changed, table
from llama_runtime.errors import RequestError
from llama_runtime.params import OPTIONS, SamplingParams

PARAMS = SamplingParams(
    max_tokens=77,
    temperature=0.7,
    top_p=0.9,
    seed=2**63,
    stop=("END", "\n\n"),
    stop_token_ids=frozenset({7, 3}),
    logit_bias={5: -100.0},
    ignore_eos=True,
    speculation="auto",
)
MESSAGES = [
    {"role": "user", "content": "你好 \x1b[31m\n"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "/x"},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "talk.json"


@pytest.mark.parametrize("system", [None, "", "Be kind."])
def test_what_was_saved_is_loaded(path: Path, system: str | None) -> None:
    conversation = Conversation(PARAMS, system, MESSAGES)
    saved.save(conversation, path, replace_it=False)
    assert saved.load(path, SamplingParams()) == conversation
    messages = json.loads(path.read_bytes())["messages"]
    assert messages == conversation.with_system(MESSAGES), "as OpenAI's API takes them"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_is_replaced_only_where_that_is_asked_for(path: Path) -> None:
    path.write_text("mine")
    conversation = Conversation(PARAMS)
    with pytest.raises(RequestError, match=r"exists: /save! .* replaces it"):
        saved.save(conversation, path, replace_it=False)
    assert path.read_text() == "mine"
    link = path.with_name("link.json")
    link.symlink_to(path)
    saved.save(conversation, link, replace_it=True)
    assert link.is_symlink()
    assert saved.load(path, SamplingParams()) == conversation


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    path.write_text("mine")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RequestError, match="No space left on device"):
        saved.save(Conversation(PARAMS), path, replace_it=True)
    assert path.read_text() == "mine"
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_cant_be_saved_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "x", tmp_path / ("x" * 300), Path("/dev/null")):
        with pytest.raises(RequestError, match=r"can't be written|is no regular file"):
            saved.save(Conversation(PARAMS), path, replace_it=True)
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        saved.save(Conversation(PARAMS, "\ud800"), tmp_path / "x", replace_it=False)
    assert not list(tmp_path.iterdir())


def test_a_file_says_as_much_as_it_likes(path: Path) -> None:
    path.write_text(json.dumps({"messages": [], "parameters": {"top_k": 3}}))
    assert saved.load(path, PARAMS) == Conversation(replace(PARAMS, top_k=3))
    path.write_text(json.dumps({"messages": MESSAGES}))
    assert saved.load(path, PARAMS) == Conversation(PARAMS, None, MESSAGES)


ONE = [{"role": "user", "content": "a"}]
WRONG_FILES: dict[str, tuple[Any, str]] = {
    "no JSON": (b"{", "is not JSON"),
    "no text": (b"\xff\xfe\xfd", "is not JSON"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "digits": (b"[" + b"9" * 5000 + b"]", "is not JSON"),
    "a list": (ONE, "must be a JSON object"),
    "no messages": ({}, "must have 'messages', a list"),
    "messages": ({"messages": "a"}, "must have 'messages', a list"),
    "a text": ({"messages": ["a"]}, "message 1 must have 'role' and 'content'"),
    "parts": ({"messages": [{"role": "user", "content": []}]}, "message 1 must have"),
    "a name": ({"messages": [*ONE, {**ONE[0], "name": "x"}]}, "message 2 must have"),
    "a tool": ({"messages": [{"role": "tool", "content": ""}]}, "message 1 is of 'tool'"),
    "late": ({"messages": [*ONE, {"role": "system", "content": ""}]}, "message 2 is of 'system'"),
    "unknown key": ({"messages": ONE, "model": "x"}, "unknown key 'model'"),
    "parameters": ({"messages": ONE, "parameters": []}, "'parameters' must be an object"),
    "unknown parameter": ({"messages": ONE, "parameters": {"n": 2}}, "unknown parameter 'n'"),
    "out of range": ({"messages": ONE, "parameters": {"top_p": 2}}, "top_p must lie in 0 to 1"),
    "not a number": ({"messages": ONE, "parameters": {"top_p": "1"}}, "top_p must be a number"),
    "bias": ({"messages": ONE, "parameters": {"logit_bias": {"x": 1}}}, "logit_bias must map"),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_wrong_file_is_one_sentence(path: Path, what: str) -> None:
    content, words = WRONG_FILES[what]
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(RequestError, match=words) as error:
        saved.load(path, PARAMS)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_isnt_there_or_never_ends_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="can't be read: No such file"):
        saved.load(tmp_path / "no", PARAMS)
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(RequestError, match="is no regular file"):
            saved.load(path, PARAMS)


def test_every_parameter_can_be_set_or_given_or_makes_no_sense_in_a_chat() -> None:
    assert sorted([*SETTABLE, *GIVEN_AT_START, *POINTLESS]) == sorted(OPTIONS)
    texts = {"speculation": "auto", "seed": "5", "include_stop": "true", "ignore_eos": "true"}
    numbers = {"max_tokens": "3", "min_tokens": "2", "top_k": "4", "repetition_penalty": "1.5"}
    for name in SETTABLE:
        text = {**texts, **numbers}.get(name, "0.25")
        after = changed(SamplingParams(), name, text)
        different = [f.name for f in fields(after) if getattr(after, f.name) != f.default]
        assert name in different
        shown = dict(line.split(None, 1) for line in table(after).splitlines())
        assert shown[name] == text
    assert changed(PARAMS, "seed", "none").seed is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("temperature", "-1", "temperature must lie in 0 to 100"),
        ("top_p", "nan", "top_p must lie in"),
        ("top_k", "1.5", "top_k must be a whole number, not '1.5'"),
        ("seed", "9" * 5000, "seed must be a whole number, or none"),
        ("ignore_eos", "maybe", "ignore_eos must be true or false, not 'maybe'"),
        ("speculation", "always", "speculation must be off, on or auto"),
        ("n", "2", "no parameter 'n' to set; there are max_tokens, "),
        ("Temperature", "1", "no parameter 'Temperature'"),
    ],
)
def test_a_wrong_value_is_one_sentence(name: str, text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as error:
        changed(PARAMS, name, text)
    assert len(str(error.value)) < 400
