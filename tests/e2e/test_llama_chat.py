"""A chat with the real model on a terminal: ask, interrupt, go on, save, end."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("terminals of POSIX", allow_module_level=True)

from tests.pseudo_terminal import PseudoTerminal


def wait_for_prompt(terminal: PseudoTerminal) -> None:
    """Until the last line is an empty prompt."""
    terminal.wait(lambda: terminal.shows().splitlines()[-1:] == [">"], "a prompt")


def test_a_chat_from_its_first_message_to_its_file(real_bundle: Path, tmp_path: Path) -> None:
    env = {**os.environ, "LLAMA_RUN_BUNDLE": os.fspath(real_bundle), "TERM": "xterm"}
    command = [sys.executable, "-m", "llama_runtime", "chat", "--temperature", "0"]
    saved = tmp_path / "talk.json"
    with PseudoTerminal(command, env, lines=40) as terminal:
        terminal.wait_for("/help shows the commands, Ctrl-D ends")
        wait_for_prompt(terminal)
        terminal.press("What is the capital of Peru?\r")
        terminal.wait_for("The capital of Peru is Lima.\n[8 tokens, ")
        wait_for_prompt(terminal)

        question = "Write a very long story about a llama."
        terminal.press(f"{question}\r")
        terminal.wait_for(f"{question}\n")
        terminal.wait(lambda: len(terminal.shows().split(question)[-1]) > 20, "a part of a story")
        terminal.press("\x03")
        terminal.wait_for("\n[stopped]\n[")
        wait_for_prompt(terminal)

        terminal.press("What is the capital of France?\r")
        terminal.wait_for("Paris")
        wait_for_prompt(terminal)
        terminal.press(f"/save {saved}\r")
        terminal.wait_for("6 messages in ")
        wait_for_prompt(terminal)
        terminal.press("\x04")
        assert terminal.status() == 0
        assert terminal.echoes()
        shown = " ".join(terminal.shows().split())

    messages = json.loads(saved.read_bytes())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    assert messages[1]["content"] == "The capital of Peru is Lima."
    story = "".join(messages[3]["content"].split())
    assert story in shown.replace(" ", ""), "what is kept of an answer is what was shown of it"
    assert 0 < len(story) < 2000
