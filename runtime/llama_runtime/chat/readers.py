"""Where messages come from: a line editor on a terminal, or plain lines."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, BinaryIO, NoReturn, Protocol

from llama_runtime.chat.entry import is_open
from llama_runtime.chat.terminal import on_ctrl_c
from llama_runtime.errors import RequestError

if TYPE_CHECKING:
    from prompt_toolkit.input import Input
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import Output

_PROMPT, _CONTINUATION = "> ", "  "


class Reader(Protocol):
    """Gives what the user enters."""

    @property
    def interactive(self) -> bool:
        """Whether somebody is there who can react."""

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was typed right behind the last entry."""

    async def read(self) -> str:
        """The next entry, of one line or several.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C, where nothing was entered.
            RequestError: it is no text, or not whole.
        """


class PromptReader:
    """A line editor, with a history for as long as the program runs.

    Args:
        source: where keys come from; None for standard input.
        output: where it draws; None for standard output.
    """

    interactive = True
    interrupted = False

    def __init__(self, source: Input | None = None, output: Output | None = None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output.vt100 import Vt100_Output

        if output is None:
            output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
            # Else it asks where the cursor is, and a slow terminal answers into what comes next.
            output.enable_cpr = False
        self._session: PromptSession[str] = PromptSession(
            _PROMPT,
            multiline=True,
            prompt_continuation=_CONTINUATION,
            key_bindings=_key_bindings(),
            enable_suspend=True,
            input=source,
            output=output,
        )

    async def read(self) -> str:
        """See ``Reader.read``."""
        self.interrupted = False
        text = await self._session.prompt_async()
        self.interrupted = self._takes_ctrl_c()
        return text

    def _takes_ctrl_c(self) -> bool:
        """Whether Ctrl-C came before keys were signals again; other keys are for the next entry."""
        from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
        from prompt_toolkit.keys import Keys

        source = self._session.app.input
        with source.raw_mode():  # else what was typed in it can't be read
            presses = [*get_typeahead(source), *source.read_keys(), *source.flush_keys()]
        store_typeahead(source, [press for press in presses if press.key != Keys.ControlC])
        return any(press.key == Keys.ControlC for press in presses)


def _key_bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline(copy_margin=False)
        elif buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys


class LineReader:
    """Plain lines, for pipes, files and terminals that can do nothing else.

    A line that ends in a backslash goes on with the next one.

    Args:
        file: standard input.
        interactive: whether it is a terminal, which is asked with a prompt on standard error.
    """

    interrupted = False  # there Ctrl-C is a signal at any time

    def __init__(self, file: BinaryIO, *, interactive: bool) -> None:
        self.interactive = interactive
        self._file = file

    async def read(self) -> str:
        """See ``Reader.read``."""
        text = self._line(_PROMPT)
        try:
            while is_open(text):
                text += "\n" + self._line(_CONTINUATION)
        except EOFError:
            raise RequestError(
                'the input ends within a block: end it with a line """', param="message"
            ) from None
        if text.startswith('"""'):
            return text
        try:
            while text.endswith("\\"):
                text = text.removesuffix("\\") + "\n" + self._line(_CONTINUATION)
        except EOFError:
            raise RequestError(
                "the input ends in a backslash, after which a line goes on", param="message"
            ) from None
        return text

    def _line(self, prompt: str) -> str:
        if self.interactive:
            sys.stderr.write(prompt)
            sys.stderr.flush()
        with on_ctrl_c(_interrupt) if self.interactive else nullcontext():
            line = self._file.readline()
        if not line:
            raise EOFError
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            message = f"a line of the input is not UTF-8 text at byte {error.start + 1}"
            raise RequestError(message, param="message") from error


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt
