"""The commands of a chat, but for those that answer or end it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama_runtime.chat import parameters, saved
from llama_runtime.chat.answer import Answer, Model
from llama_runtime.chat.conversation import Conversation
from llama_runtime.chat.entry import Command
from llama_runtime.errors import RequestError, one_line

HELP = """\
/system [TEXT]    show or set what the model is told first; "" removes it
/set [NAME VALUE] show the parameters, or set one
/retry            answer the last message again
/undo             take back the last message and its answer
/reset            begin a new conversation
/save FILE        write the conversation as JSON; /save! replaces a file
/load FILE        go on with a saved one
/stats            tokens, speed, and how full the context is
/exit             end, as Ctrl-D does
//TEXT            send a message that begins with a slash
Alt-Enter begins a new line, and so does Enter after \\
A message of many lines may stand between lines of \"\"\"
Ctrl-C stops an answer, or clears the line"""


@dataclass(slots=True)
class State:
    """What the commands look at and change.

    Attributes:
        model: the model.
        conversation: what was said.
        last: the last answer of this run.
        num_tokens: tokens of all its answers.
    """

    model: Model
    conversation: Conversation
    last: Answer | None = None
    num_tokens: int = 0


def perform(state: State, command: Command) -> str:
    """Run a command.

    Returns:
        What to say.

    Raises:
        RequestError: there is no such command, or it can't be done; then nothing has changed.
    """
    if command.name not in _ACTS:
        raise RequestError(
            f"there is no command /{one_line(command.name, 40)}: /help shows those there are, and "
            "// begins a message with a slash",
            param="command",
        )
    return _ACTS[command.name](state, command.argument)


def _help(_state: State, _argument: str) -> str:
    return HELP


def _system(state: State, argument: str) -> str:
    conversation = state.conversation
    if argument:
        conversation.system = None if argument == '""' else argument
        return "it holds from the next answer on"
    if conversation.system is None:
        return "no system prompt but the chat template's, if it has one"
    return conversation.system


def _set(state: State, argument: str) -> str:
    if not argument:
        return parameters.table(state.conversation.params)
    name, *value = argument.split(maxsplit=1)
    if not value:
        raise RequestError(f"a value is missing: /set {one_line(name, 40)} VALUE", param="value")
    state.conversation.params = parameters.changed(state.conversation.params, name, value[0])
    return f"{name} {value[0]}"


def _undo(state: State, _argument: str) -> str:
    state.conversation.undo()
    return f"taken back; {_count(state.conversation)}"


def _reset(state: State, _argument: str) -> str:
    state.conversation.messages = []
    return "a new conversation; the system prompt and the parameters stay"


def _save(state: State, argument: str) -> str:
    return _save_to(state, argument, replace_it=False)


def _save_over(state: State, argument: str) -> str:
    return _save_to(state, argument, replace_it=True)


def _save_to(state: State, argument: str, *, replace_it: bool) -> str:
    path = _path(argument, "save")
    saved.save(state.conversation, path, replace_it=replace_it)
    return f"{_count(state.conversation)} in {path}"


def _load(state: State, argument: str) -> str:
    state.conversation = saved.load(_path(argument, "load"), state.conversation.params)
    return f"loaded; {_count(state.conversation)}"


def _stats(state: State, _argument: str) -> str:
    conversation, last, counted = state.conversation, state.last, state.model.stats()
    sent = conversation.with_system(conversation.messages)
    used = len(state.model.chat_prompt(sent)) if sent else 0
    lines = [f"conversation  {_count(conversation)}"]
    lines.append(f"context       {used} of {state.model.max_len} tokens")
    if last is not None:
        lines.append(f"last answer   {speed(last)}")
    lines.append(f"this run      {state.num_tokens} tokens of answers")
    lines.append(
        f"prompts       {counted.prompt_tokens} tokens, {counted.reused_tokens} of them reused"
    )
    return "\n".join(lines)


def speed(answer: Answer) -> str:
    """How many tokens an answer has, and how fast they came."""
    text = f"{answer.num_tokens} token{'s' * (answer.num_tokens != 1)}"
    if answer.num_tokens < 2 or not answer.seconds:
        return text
    return f"{text}, {(answer.num_tokens - 1) / answer.seconds:.1f} tokens/s"


def _count(conversation: Conversation) -> str:
    count = len(conversation.messages)
    return f"{count} message{'s' * (count != 1)}"


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise RequestError(f"the name of a file is missing: /{command} FILE", param="file")
    if "\0" in argument:
        raise RequestError("the name of a file has no zero byte", param="file")
    return Path(os.path.expanduser(argument))  # which leaves an unknown ~user as it is


_ACTS: dict[str, Callable[[State, str], str]] = {
    "help": _help,
    "system": _system,
    "set": _set,
    "undo": _undo,
    "reset": _reset,
    "save": _save,
    "save!": _save_over,
    "load": _load,
    "stats": _stats,
}
