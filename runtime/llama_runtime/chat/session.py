"""The loop of a chat: read, answer, and never lose what was said."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

from llama_runtime.chat.answer import Answer
from llama_runtime.chat.conversation import Message
from llama_runtime.chat.entry import Command, parse
from llama_runtime.chat.readers import Reader
from llama_runtime.chat.screen import Screen
from llama_runtime.chat.slash import State, perform, speed
from llama_runtime.chat.terminal import on_ctrl_c, without_echo
from llama_runtime.command_line import INTERRUPTED
from llama_runtime.errors import CaravanError, one_line

LITTLE_ROOM = 256  # tokens; with fewer left the user is told


class Session:
    """A chat from its first message to its end.

    Where nobody is there to react, an error ends it; otherwise it is a sentence, and the
    conversation is as before.

    Args:
        state: the model and the conversation.
        reader: where messages come from.
        screen: where answers go.
    """

    def __init__(self, state: State, reader: Reader, screen: Screen) -> None:
        self._state = state
        self._reader = reader
        self._screen = screen
        self._pressed = False  # Ctrl-C, since the last message

    async def run(self) -> int:
        """Chat until the user ends it.

        Returns:
            The exit status.

        Raises:
            CaravanError: something went wrong, and nobody is there to react.
        """
        if not self._reader.interactive:
            return await self._loop()
        with on_ctrl_c(self._press):
            return await self._loop()

    def _press(self) -> None:
        """Remember a Ctrl-C that comes while the prompt of an answer is still being made."""
        self._pressed = True

    async def _loop(self) -> int:
        warned = False  # that one more Ctrl-C ends the chat
        while True:
            self._pressed = False
            try:
                entry = parse(await self._reader.read())
                self._pressed |= self._reader.interrupted
                warned = False
                if isinstance(entry, Command) and entry.name == "exit":
                    return 0
                await self._take(entry)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                if warned:
                    return INTERRUPTED
                warned = True
                self._screen.say("Ctrl-C again, or Ctrl-D, ends the chat")
            except CaravanError as error:
                if not self._reader.interactive:
                    raise
                self._screen.say(f"Error: {one_line(error)}")

    async def _take(self, entry: Command | str) -> None:
        conversation = self._state.conversation
        if isinstance(entry, Command) and entry.name == "retry":
            messages = conversation.before_last_answer()
            if conversation.params.greedy or conversation.params.seed is not None:
                self._screen.remark(
                    "the same again, unless /set temperature 0.8 and /set seed none vary it"
                )
            await self._answer(messages)
        elif isinstance(entry, Command):
            self._screen.say(perform(self._state, entry))
        elif entry.strip():
            question = {"role": "user", "content": entry}
            await self._answer([*conversation.messages, question])

    async def _answer(self, messages: list[Message]) -> None:
        """Answer, and keep question and answer; also what came of one that was stopped."""
        state = self._state
        params = state.conversation.params
        answer = Answer.of(state.model, state.conversation.with_system(messages), params)
        shortened = answer.params.max_tokens < params.max_tokens
        if shortened and answer.params.max_tokens < LITTLE_ROOM:
            self._screen.say(f"the context has room for {answer.params.max_tokens} tokens more")
        try:
            stopped = await self._streamed(answer)
        finally:
            if answer.num_tokens:
                self._screen.show("\n")
        state.num_tokens += answer.num_tokens
        if stopped:
            self._screen.say("[stopped]")
        elif answer.cut and shortened:
            self._screen.say("[the context is full: /undo the last exchange, or /reset]")
        elif answer.cut:
            self._screen.say(
                f"[cut off at max_tokens {params.max_tokens}: /set it higher for more]"
            )
        if stopped and not answer.num_tokens:
            return
        state.last = answer
        state.conversation.messages = [*messages, {"role": "assistant", "content": answer.text}]
        used = f"context {answer.num_context_tokens} of {state.model.max_len}"
        self._screen.remark(f"[{speed(answer)}, {used}]")
        self._screen.space()

    async def _streamed(self, answer: Answer) -> bool:
        """Show an answer as it comes; whether Ctrl-C stopped it."""
        stop_soon = asyncio.get_running_loop().call_soon_threadsafe
        coming = asyncio.create_task(answer.stream(self._state.model, self._screen.show))
        with ExitStack() as stack:
            if self._reader.interactive:
                stack.enter_context(without_echo())
                # Which also wakes the loop, where it waits for an event.
                stack.enter_context(on_ctrl_c(lambda: stop_soon(coming.cancel)))
            if self._pressed:
                coming.cancel()
            try:
                await coming
            except asyncio.CancelledError:
                return True
        return False
