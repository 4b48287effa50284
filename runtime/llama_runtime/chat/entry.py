"""What a user entered: a message to the model, or a command to the program."""

from __future__ import annotations

from dataclasses import dataclass

BLOCK = '"""'


@dataclass(frozen=True, slots=True)
class Command:
    """A line that begins with a slash.

    Attributes:
        name: the word after the slash.
        argument: what follows it, without white space around.
    """

    name: str
    argument: str


def is_open(text: str) -> bool:
    """Whether a block of lines was begun with three quotes, and is not ended yet."""
    return text.startswith(BLOCK) and text.count(BLOCK) == 1


def parse(text: str) -> Command | str:
    """A command, or the message.

    A message may stand between three quotes; then nothing in it is a command. Two slashes begin a
    message with one. Blank lines around a message are no part of it.
    """
    text = text.strip("\r\n")
    if text.startswith(BLOCK) and text.rstrip().endswith(BLOCK) and text.count(BLOCK) == 2:
        return text.rstrip().removeprefix(BLOCK).removesuffix(BLOCK).strip("\r\n")
    if text.startswith("//"):
        return text[1:]
    if text.startswith("/"):
        name, *rest = text[1:].split(maxsplit=1) or [""]
        return Command(name, rest[0].strip() if rest else "")
    return text
