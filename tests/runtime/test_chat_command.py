"""``llama-run chat`` in a pipe, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llama_runtime import loading
from llama_runtime.cli import cli
from llama_runtime.llm import LLM
from llama_runtime.params import SamplingParams

Run = Callable[..., Result]


@pytest.fixture
def run(fake_backend: None, fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs ``llama-run chat`` on the fake bundle, in this process."""
    monkeypatch.setenv("LLAMA_RUN_BUNDLE", os.fspath(fake_bundle))

    def run(*args: object, stdin: bytes = b"") -> Result:
        given = ["chat", *map(str, args)]
        return CliRunner().invoke(cli, given, input=stdin, prog_name="llama-run")

    return run


def test_a_pipe_gets_the_answers_as_they_are_and_nothing_else(run: Run, fake_bundle: Path) -> None:
    result = run("--max-tokens", 200, "--ignore-eos", "--system", "S", stdin=b"hello\n/stats\n")
    assert result.exit_code == 0, result.output
    with LLM(fake_bundle, max_batch=1, threads=1) as loaded:
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hello"}]
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        (expected,) = loaded.chat(messages, params)
    assert result.stdout_bytes == expected.text.encode() + b"\n"
    assert any(ord(c) < 32 for c in expected.text), "control characters among them"
    assert "[cut off at max_tokens 200" in result.stderr
    assert "tokens/s" in result.stderr, "as /stats was asked for"
    assert "\x1b" not in result.stderr


def test_an_empty_pipe_is_a_chat_in_which_nothing_is_said(run: Run) -> None:
    result = run()
    assert (result.exit_code, result.output) == (0, "")


def test_options_go_before_a_loaded_file_and_that_before_the_bundle(
    run: Run, tmp_path: Path
) -> None:
    path, again = tmp_path / "talk.json", tmp_path / "again.json"
    saved = run(
        *("--stop", "x", "--logit-bias", "5=-1", "--top-k", 9, "--seed", 7, "--system", "S"),
        stdin=f"hello\n/save {path}\n".encode(),
    )
    assert saved.exit_code == 0, saved.output
    loaded = run("--load", path, "--top-k", 3, "--system", "", stdin=f"/save {again}\n".encode())
    assert loaded.exit_code == 0, loaded.output
    before, after = (json.loads(file.read_bytes()) for file in (path, again))
    assert after["messages"] == before["messages"][1:]
    assert before["messages"][0] == {"role": "system", "content": "S"}
    expected = {"max_tokens": 1024, "seed": 7, "top_k": 3, "stop": ["x"], "logit_bias": {"5": -1.0}}
    assert {name: after["parameters"][name] for name in expected} == expected


def test_max_tokens_is_lowered_to_what_the_context_has(run: Run) -> None:
    result = run("--ignore-eos", "--max-len", 100, stdin=b"hello\n/stats\n")
    assert result.exit_code == 0, result.output
    assert "[the context is full: /undo the last exchange, or /reset]" in result.stderr


WRONG: dict[str, tuple[list[object], bytes, str]] = {
    "no chat": (["--no-chat"], b"", "leave --no-chat out"),
    "several": (["-n", 2], b"", "-n must be 1"),
    "logprobs": (["--logprobs"], b"", "a chat shows no log-probabilities"),
    "prompt logprobs": (["--prompt-logprobs"], b"", "a chat shows no log-probabilities"),
    "no file": (["--load", "/no/where.json"], b"", "/no/where.json can't be read"),
    "temperature": (["--temperature", -1], b"", "temperature must lie in 0 to 100"),
    "no bundle": (["--bundle", "/no/where"], b"", "/no/where does not exist"),
    "command": ([], b"/nothing\nhello\n", "there is no command /nothing"),
    "value": ([], b"/set top_p 2\nhello\n", "top_p must lie in 0 to 1"),
    "open block": ([], b'"""\nhello\n', "ends within a block"),
    "no text": ([], b"\xff\n", "not UTF-8"),
    "too long": ([], b"x" * 600 + b"\n", "the conversation has 6"),
}


@pytest.mark.parametrize("use", WRONG)
def test_wrong_use_is_one_sentence_and_status_2(run: Run, use: str) -> None:
    args, stdin, words = WRONG[use]
    result = run(*args, stdin=stdin)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (error,) = result.stderr.splitlines()
    assert error.startswith("Error: ")
    assert words in error


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    run: Run, raw_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "open_session", None)  # so that loading would fail
    result = run("--bundle", raw_bundle)
    assert result.exit_code == 2
    assert "raw_bundle has no chat template" in result.stderr
    for use in ("several", "logprobs", "no file", "temperature"):
        assert run(*WRONG[use][0]).exit_code == 2
