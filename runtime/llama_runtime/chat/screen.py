"""What a chat shows: answers on standard output, what it says itself on standard error."""

from __future__ import annotations

import os
import textwrap
from contextlib import suppress
from typing import TextIO

from llama_runtime.command_line import print_out

_NARROWEST = 20  # columns; with fewer there is nothing to be gained
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROLS = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")}
# Marks that make a terminal show a text in another order than it has.
_BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_VISIBLE = {code: ascii(chr(code))[1:-1] for code in _CONTROLS | _BIDI}


def visible(text: str) -> str:
    r"""Text that can do nothing to a terminal: what controls one is written as ``\x1b`` is here."""
    return text.translate(_VISIBLE)


class Screen:
    """Where a chat writes.

    Args:
        out: standard output.
        notes: standard error.
        quiet: whether nothing is said that nobody asked for.
    """

    def __init__(self, out: TextIO, notes: TextIO, *, quiet: bool = False) -> None:
        self._notes = notes
        self._to_terminal = out.isatty()
        self._notes_to_terminal = notes.isatty()
        self._quiet = quiet
        self._dims = (
            self._notes_to_terminal
            and "NO_COLOR" not in os.environ
            and os.environ.get("TERM") != "dumb"
        )

    def show(self, text: str) -> None:
        """Show a part of an answer, on a terminal harmlessly; a pipe gets it as it is.

        Raises:
            BrokenPipeError: nobody reads it any more.
            CaravanError: it can't be written.
        """
        if text:
            print_out(visible(text) if self._to_terminal else text)

    def say(self, text: str) -> None:
        """Say something that the user asked for, or has to know."""
        lines = text.split("\n")
        if self._notes_to_terminal:
            lines = [part for line in lines for part in self._wrapped(visible(line))]
        styled = [f"{_DIM}{line}{_PLAIN}" if self._dims else line for line in lines]
        with suppress(OSError):  # nobody reads it any more, which is no reason to end the chat
            self._notes.write("\n".join(styled) + "\n")
            self._notes.flush()

    def remark(self, text: str) -> None:
        """Say something by the way, to somebody who is there to read it."""
        if self._notes_to_terminal and not self._quiet:
            self.say(text)

    def space(self) -> None:
        """Leave a line free on a terminal, before it is the user's turn."""
        if self._to_terminal:
            print_out("\n")

    def _wrapped(self, line: str) -> list[str]:
        """Lines that end between words. Answers don't: what is copied of one should be whole."""
        try:
            columns = os.get_terminal_size(self._notes.fileno()).columns
        except OSError:
            columns = 0
        if len(line) <= columns or columns < _NARROWEST:
            return [line]
        return textwrap.wrap(line, columns, subsequent_indent="  ", replace_whitespace=False)
