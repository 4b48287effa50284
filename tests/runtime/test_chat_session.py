"""The loop of a chat over a model that says what a test wants: nothing that was said is lost."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import time
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llama_runtime.async_llm import AsyncLLM
from llama_runtime.bundle import open_bundle
from llama_runtime.chat.command import LoadedModel
from llama_runtime.chat.conversation import Conversation
from llama_runtime.chat.screen import Screen, visible
from llama_runtime.chat.session import Session
from llama_runtime.chat.slash import HELP, State
from llama_runtime.command_line import INTERRUPTED
from llama_runtime.errors import BackendError, CaravanError
from llama_runtime.events import TokenEvent
from llama_runtime.params import SamplingParams
from llama_runtime.prompt_encoder import PromptEncoder
from llama_runtime.sequence import FinishReason
from llama_runtime.shared_engine import Stats

CTRL_C = "ctrl-c"  # among the words of an answer: the user presses it


@dataclass
class Scripted:
    """A model whose answers are known; a character of a conversation is a token of its prompt."""

    answers: list[list[str]]
    max_len: int = 1000
    asked: list[list[str]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    closed: int = 0

    def chat_prompt(self, messages: Seq[Mapping[str, object]]) -> list[int]:
        if messages[-1]["content"] == CTRL_C:
            os.kill(os.getpid(), signal.SIGINT)
        self.asked.append([f"{message['role']}: {message['content']}" for message in messages])
        return [0] * sum(len(str(message["content"])) for message in messages)

    async def stream(
        self, prompt: list[int], params: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]:
        assert len(prompt) + params.max_tokens <= self.max_len
        self.params.append(params)
        try:
            words = self.answers.pop(0)
            for i, word in enumerate(words[: params.max_tokens], 1):
                if word == CTRL_C:
                    os.kill(os.getpid(), signal.SIGINT)
                    await asyncio.sleep(5)
                if word == "fail":
                    raise BackendError("the backend failed")
                full = i == params.max_tokens
                reason: FinishReason | None = (
                    "length" if full else "stop" if i == len(words) else None
                )
                yield TokenEvent(0, i, word, reason)
        finally:
            self.closed += 1

    def stats(self) -> Stats:
        return Stats()


class Entries:
    """A user who enters these, one after the other."""

    def __init__(self, entries: Seq[str | type[BaseException]], *, interactive: bool) -> None:
        self.interactive = interactive
        self.interrupted = False
        self._entries = [*entries, EOFError]

    async def read(self) -> str:
        entry = self._entries.pop(0)
        if isinstance(entry, str):
            return entry
        raise entry


@dataclass
class Talk:
    status: int
    said: str
    conversation: Conversation

    @property
    def messages(self) -> list[str]:
        return [message["content"] for message in self.conversation.messages]


def talk(
    model: Scripted,
    *entries: str | type[BaseException],
    interactive: bool = True,
    params: SamplingParams | None = None,
) -> Talk:
    notes = io.StringIO()
    state = State(model, Conversation(params or SamplingParams(temperature=1.0)))
    screen = Screen(io.StringIO(), notes)
    session = Session(state, Entries(entries, interactive=interactive), screen)
    status = asyncio.run(session.run())
    return Talk(status, notes.getvalue(), state.conversation)


def test_each_message_is_asked_with_all_that_was_said_before(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    model = Scripted([["A", "1"], ["A2"]])
    done = talk(model, "/system Be kind.", "Q1", "", "  ", "Q2")
    assert model.asked == [
        ["system: Be kind.", "user: Q1"],
        ["system: Be kind.", "user: Q1", "assistant: A1", "user: Q2"],
    ]
    assert (done.status, done.messages) == (0, ["Q1", "A1", "Q2", "A2"])
    assert capfdbinary.readouterr().out == b"A1\nA2\n"


@pytest.mark.alone
def test_ctrl_c_stops_the_answer_and_keeps_what_came() -> None:
    before = signal.getsignal(signal.SIGINT)
    model = Scripted([["half", CTRL_C, "never"], ["A2"]])
    started = time.monotonic()
    done = talk(model, "Q1", "Q2")
    assert time.monotonic() - started < 4
    assert (done.status, done.messages) == (0, ["Q1", "half", "Q2", "A2"])
    assert "[stopped]" in done.said
    assert model.closed == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_message_that_was_stopped_before_its_answer_was_not_said() -> None:
    done = talk(Scripted([[CTRL_C], ["A2"]]), "Q1", "Q2")
    assert (done.messages, "[stopped]" in done.said) == (["Q2", "A2"], True)
    model = Scripted([["A2"]])
    done = talk(model, CTRL_C, "Q2")
    assert (done.messages, "[stopped]" in done.said) == (["Q2", "A2"], True)
    assert len(model.params) == 1, "the first was never begun"


def test_two_ctrl_c_at_the_prompt_end_it_and_one_does_not() -> None:
    done = talk(Scripted([["A"]]), KeyboardInterrupt, "Q", KeyboardInterrupt)
    assert (done.status, done.messages) == (0, ["Q", "A"])
    assert done.said.count("Ctrl-C again, or Ctrl-D, ends the chat") == 2
    done = talk(Scripted([]), KeyboardInterrupt, KeyboardInterrupt, "Q")
    assert (done.status, done.messages) == (INTERRUPTED, [])
    assert talk(Scripted([]), "/exit", "Q").status == 0


def test_an_error_changes_nothing_and_ends_only_what_nobody_watches() -> None:
    answers = [["A1"], ["half", "fail"], ["A3"]]
    done = talk(Scripted([*answers]), "Q1", "Q2", "Q3")
    assert done.messages == ["Q1", "A1", "Q3", "A3"]
    assert done.said.count("Error: the backend failed\n") == 1
    with pytest.raises(BackendError):
        talk(Scripted([*answers]), "Q1", "Q2", "Q3", interactive=False)
    with pytest.raises(CaravanError, match="no command /nothing"):
        talk(Scripted([]), "/nothing", interactive=False)


def test_retry_asks_again_and_undo_takes_back() -> None:
    model = Scripted([["A1"], ["A2"], ["other"]])
    done = talk(model, "Q1", "Q2", "/retry")
    assert model.asked[-1] == ["user: Q1", "assistant: A1", "user: Q2"]
    assert done.messages == ["Q1", "A1", "Q2", "other"]
    done = talk(Scripted([["A1"], ["A2"]]), "Q1", "Q2", "/undo")
    assert done.messages == ["Q1", "A1"]
    for command in ("/undo", "/retry"):
        done = talk(Scripted([]), command)
        assert done.said == "Error: nothing has been asked yet\n"


def test_a_retry_that_is_stopped_or_fails_keeps_the_answer_there_was() -> None:
    for again in ([CTRL_C], ["fail"]):
        assert talk(Scripted([["A1"], again]), "Q1", "/retry").messages == ["Q1", "A1"]


def test_an_answer_gets_what_room_there_is_and_the_user_is_told() -> None:
    params = SamplingParams(max_tokens=50, min_tokens=40)
    model = Scripted([["w"] * 100, ["w"] * 100], max_len=100)
    done = talk(model, "x" * 20, "y" * 20, "z" * 20, params=params)
    assert [(p.max_tokens, p.min_tokens) for p in model.params] == [(50, 40), (10, 10)]
    assert done.messages == ["x" * 20, "w" * 50, "y" * 20, "w" * 10], "the third had no room"
    assert done.said.splitlines() == [
        "[cut off at max_tokens 50: /set it higher for more]",
        "the context has room for 10 tokens more",
        "[the context is full: /undo the last exchange, or /reset]",
        "Error: with this message the conversation has 120 tokens, and the context has 100: it was "
        "not sent; shorten it, or /undo the last exchange, or /reset",
    ]
    assert done.conversation.params == params, "what was set stays set"


def test_parameters_hold_from_the_next_answer_on_and_wrong_ones_change_nothing() -> None:
    model = Scripted([["A"], ["B"]])
    done = talk(model, "Q", "/set top_k 5", "/set top_k x", "/set top_k", "/set", "Q")
    assert [p.top_k for p in model.params] == [0, 5]
    assert "Error: top_k must be a whole number, not 'x'\n" in done.said
    assert "Error: a value is missing: /set top_k VALUE\n" in done.said
    assert "temperature         1\n" in done.said


def test_a_conversation_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "a talk.json"
    talk(Scripted([["A"]]), "/system S", "/set seed 4", "Q", f"/save {path}")
    model = Scripted([["B"], ["C"]])
    done = talk(model, "x", f"/load {path}", "Q2", f"/save {path}", f"/save! {path}")
    assert model.asked[-1] == ["system: S", "user: Q", "assistant: A", "user: Q2"]
    assert model.params[-1].seed == 4
    assert f"exists: /save! {path} replaces it" in done.said
    assert len(json.loads(path.read_text())["messages"]) == 5
    failed = talk(Scripted([["A"]]), "Q", "/load /no/where", "/load", "/save", "/save a\0b")
    assert (failed.messages, failed.said.count("Error: ")) == (["Q", "A"], 4)


def test_the_system_prompt_can_be_seen_and_removed_and_reset_keeps_it() -> None:
    model = Scripted([["A"], ["B"], ["C"]])
    talk(model, "/system S", "Q", "/reset", "R", '/system ""', "T")
    assert model.asked[1] == ["system: S", "user: R"]
    assert model.asked[2] == ["user: R", "assistant: B", "user: T"]
    assert talk(Scripted([]), "/system S", "/system").said.splitlines()[-1] == "S"


def test_help_names_every_command_and_an_unknown_one_is_one_sentence() -> None:
    for line in HELP.splitlines():
        if line.startswith("/") and not line.startswith("//"):
            said = talk(Scripted([]), line.split()[0]).said
            assert "there is no command" not in said, line
    said = talk(Scripted([]), "/help", "/sav e").said
    assert said.startswith(HELP)
    assert said.splitlines()[-1].startswith("Error: there is no command /sav: ")
    assert all(len(line) <= 80 for line in said.splitlines()[:-1])


def test_stats_say_how_full_the_context_is() -> None:
    said = talk(Scripted([["A", "B"]]), "/stats", "QQQ", "/stats").said
    assert "context       0 of 1000 tokens" in said
    assert "context       5 of 1000 tokens" in said
    assert "this run      2 tokens of answers" in said


def test_nothing_that_a_terminal_would_obey_is_visible_as_it_is() -> None:
    harmful = [chr(i) for i in (*range(9), *range(11, 32), *range(127, 160))]
    harmful += ["\u202e", "\u2066", "\u200f"]
    shown = visible("".join(harmful))
    assert not set(shown) & set(harmful)
    assert visible("\x1b[2J\a\x9b\r") == r"\x1b[2J\x07\x9b\r"
    fine = "a\tb\nc é 你好 👩‍🚀 می‌خواهم"
    assert visible(fine) == fine


class Pressed(Screen):
    """The user presses Ctrl-C when so many tokens are there."""

    def __init__(self, at: int) -> None:
        super().__init__(io.StringIO(), io.StringIO())
        self._left = at

    def show(self, text: str) -> None:
        self._left -= bool(text)
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stopped_answer_frees_its_slot_at_once(fake_backend: None, fake_bundle: Path) -> None:
    params = SamplingParams(max_tokens=400, ignore_eos=True)

    async def chat() -> tuple[int, int]:
        encoder = PromptEncoder(open_bundle(fake_bundle))
        async with await AsyncLLM.load(encoder, max_batch=1, threads=1) as llm:
            state = State(LoadedModel(llm, encoder), Conversation(params))
            await Session(state, Entries(["Q"], interactive=True), Pressed(3)).run()
            end = time.monotonic() + 10
            while llm.stats().running and time.monotonic() < end:
                await asyncio.sleep(0.005)
            return llm.stats().running, llm.stats().completion_tokens

    running, num_tokens = asyncio.run(chat())
    assert (running, num_tokens < 400) == (0, True)
