"""``llama-run chat`` on a terminal, as a user has it: keys, signals, sizes, and the screen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("terminals of POSIX", allow_module_level=True)

from tests.pseudo_terminal import PseudoTerminal

# The command itself, from its first import on, with the fake backend. Its steps take time, and so
# does loading it, if the first argument says so.
FAKE = """
import sys, time
from llama_runtime import loading
from llama_runtime.backends.fake import Fake
from llama_runtime.sampling import Reference

seconds, loading_seconds = float(sys.argv.pop(1)), float(sys.argv.pop(1))

class SlowFake(Fake):
    def run(self, step):
        time.sleep(seconds)
        return super().run(step)

loading.open_session = lambda graph, threads: time.sleep(loading_seconds)
loading.OrtSampler = lambda *_: Reference()
loading.OrtCpu = lambda session, geometry, *, num_slots, capacity, num_prefix_blocks, **_: SlowFake(
    num_slots, capacity, geometry.vocab_size, num_prefix_blocks=num_prefix_blocks
)
from llama_runtime.__main__ import main
main()
"""
# The bytes of letters only, so that answers can be told from everything else.
LETTERS = [f"--logit-bias={token}=100" for token in range(64, 90)]


def command(*args: object, seconds: float = 0.02, loading: float = 0.0) -> list[str]:
    return [sys.executable, "-c", FAKE, str(seconds), str(loading), "chat", *map(str, args)]


@pytest.fixture
def env(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.delenv("NO_COLOR", raising=False)
    return {**os.environ, "LLAMA_RUN_BUNDLE": os.fspath(fake_bundle), "TERM": "xterm-256color"}


def wait_for_prompt(terminal: PseudoTerminal) -> None:
    """Until the last line is an empty prompt."""
    terminal.wait(lambda: terminal.shows().splitlines()[-1:] == [">"], "a prompt")


def test_ctrl_c_stops_an_answer_and_two_at_the_prompt_end_the_chat(env: dict[str, str]) -> None:
    with PseudoTerminal(command("--ignore-eos", "--max-len", 500, *LETTERS), env) as terminal:
        terminal.wait_for("/help shows the commands, Ctrl-D ends")
        wait_for_prompt(terminal)
        terminal.press("first\x1b\rmessage\r")
        terminal.wait_for("> first\n  message\n")
        terminal.wait(lambda: len(terminal.shows().split("\n  message")[-1]) > 9, "an answer")
        terminal.press("typed ahead")
        terminal.press("\x03")
        terminal.wait_for("[stopped]\n[")
        wait_for_prompt(terminal)
        assert "^C" not in terminal.shows()
        assert "typed" not in terminal.shows(), "it would stand within the answer"
        terminal.press("/stats\r")
        terminal.wait_for("conversation  2 messages")
        wait_for_prompt(terminal)
        terminal.press("\x03")
        terminal.wait_for("Ctrl-C again, or Ctrl-D, ends the chat")
        wait_for_prompt(terminal)
        terminal.press("wrong\x03\x03")
        assert terminal.status() == 130
        assert terminal.echoes()
        assert "Traceback" not in terminal.shows()


def test_ctrl_c_right_behind_a_message_stops_its_answer_and_nothing_else(
    env: dict[str, str],
) -> None:
    """Both come in one read, before the terminal makes a signal of the key again."""
    with PseudoTerminal(command("--ignore-eos", "--max-len", 500, *LETTERS), env) as terminal:
        wait_for_prompt(terminal)
        terminal.press("one\r\x03")
        terminal.wait_for("[stopped]")
        wait_for_prompt(terminal)
        terminal.press("two\r\x03\x03\x03")
        terminal.wait(lambda: terminal.shows().count("[stopped]") == 2, "another end")
        wait_for_prompt(terminal)
        assert "ends the chat" not in terminal.shows()
        terminal.press("\x04")
        assert terminal.status() == 0


def test_history_paste_and_a_screen_that_changes_its_size(env: dict[str, str]) -> None:
    args = command("--max-tokens", 5, *LETTERS, seconds=0)
    with PseudoTerminal(args, env, columns=40, lines=12) as terminal:
        wait_for_prompt(terminal)
        terminal.press("\x1b[200~one\nmessage\x1b[201~\r")
        terminal.wait_for("> one\n  message\n")
        terminal.wait_for("[cut off at max_tokens 5")
        wait_for_prompt(terminal)
        terminal.resize(60, 20)
        terminal.press("/undo\r")
        terminal.wait_for("taken back; 0 messages")
        wait_for_prompt(terminal)
        terminal.press("\x1b[A\x1b[A\x1b[A")
        terminal.wait(lambda: terminal.shows().endswith("> one\n  message"), "what was sent")
        terminal.press("\x03\x04")
        assert terminal.status() == 0
        assert terminal.echoes()


@pytest.mark.parametrize("moment", ["prompt", "answer"])
def test_sigterm_ends_at_once_and_leaves_the_terminal_as_it_was(
    moment: str, env: dict[str, str]
) -> None:
    with PseudoTerminal(command("--ignore-eos", "--max-len", 500, *LETTERS), env) as terminal:
        wait_for_prompt(terminal)
        if moment == "answer":
            terminal.press("message\r")
            terminal.wait_for("> message\n")
            terminal.wait(lambda: len(terminal.shows().split("> message")[-1]) > 9, "an answer")
        assert not terminal.echoes()
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.status() == 128 + signal.SIGTERM
        assert terminal.echoes()
        assert terminal.shows().endswith("interrupted")
        assert terminal.raw.rindex(b"\x1b[?2004l") > terminal.raw.rindex(b"\x1b[?2004h")


def test_ctrl_c_while_it_loads_ends_it(env: dict[str, str]) -> None:
    with PseudoTerminal(command(loading=30), env) as terminal:
        terminal.wait_for("loading the model")
        terminal.press("\x03")
        assert terminal.status() == 130
        assert terminal.shows().endswith("interrupted")


def test_an_interrupt_from_elsewhere_is_as_ctrl_c(env: dict[str, str]) -> None:
    with PseudoTerminal(command(), env) as terminal:
        wait_for_prompt(terminal)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("Ctrl-C again, or Ctrl-D, ends the chat")
        wait_for_prompt(terminal)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.status() == 130


def test_a_dumb_terminal_gets_no_control_characters_whatever_the_model_says(
    env: dict[str, str],
) -> None:
    env = {**env, "TERM": "dumb"}
    args = command("--ignore-eos", "--max-tokens", 400, seconds=0)
    with PseudoTerminal(args, env) as terminal:
        wait_for_prompt(terminal)
        terminal.press("one\\\nmessage\n")
        terminal.wait_for("[cut off at max_tokens 400")
        wait_for_prompt(terminal)
        terminal.press("\x03")
        terminal.wait_for("Ctrl-C again")
        wait_for_prompt(terminal)
        terminal.press("\x04")
        assert terminal.status() == 0
        _, answer = terminal.raw.split(b"message\r\n", 1)
        answer, _ = answer.split(b"[cut off", 1)
        harmful = {chr(i) for i in (*range(32), *range(127, 160))} - {"\t", "\n", "\r"}
        assert not harmful & set(answer.replace(b"\r\n", b"\n").decode())
        assert rb"\x1b" in answer, "there was something to be shown harmlessly"


def test_no_color_means_no_styles(env: dict[str, str]) -> None:
    for name, styled in (("X", True), ("NO_COLOR", False)):
        with PseudoTerminal(command(seconds=0), {**env, name: "1"}) as terminal:
            wait_for_prompt(terminal)
            terminal.press("/undo\r\x04")
            assert terminal.status() == 0
            assert (b"\x1b[2m" in terminal.raw) is styled


def test_ctrl_c_in_a_pipe_ends_the_program(env: dict[str, str]) -> None:
    run = subprocess.Popen(
        command("--ignore-eos", "--max-len", 500, *LETTERS, seconds=0.05),
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert run.stdin is not None
    assert run.stdout is not None
    run.stdin.write(b"hello\nagain\n")
    run.stdin.flush()
    assert run.stdout.read(3).islower()
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert (run.returncode, said) == (130, b"interrupted\n")
