"""What a chat takes for a message and what for a command, typed or from a pipe."""

from __future__ import annotations

import asyncio
import io

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from llama_runtime.chat.entry import Command, parse
from llama_runtime.chat.readers import LineReader, PromptReader, Reader
from llama_runtime.errors import RequestError

INTERRUPT = Command("Ctrl-C", "")
ENTRIES: dict[str, Command | str] = {
    "hello": "hello",
    "  two words ": "  two words ",
    "/help": Command("help", ""),
    "/set  top_p   0.5 ": Command("set", "top_p   0.5"),
    "/save! a b.json": Command("save!", "a b.json"),
    "/system be brief\nand kind": Command("system", "be brief\nand kind"),
    "/": Command("", ""),
    "//etc/hosts": "/etc/hosts",
    "///": "//",
    " /help": " /help",
    '"""\n/help\n"""': "/help",
    '"""one\n\ntwo"""': "one\n\ntwo",
    '"""Doc."""\nimport os': '"""Doc."""\nimport os',
    '""" open': '""" open',
    "\n\nhello\r\n": "hello",
}


@pytest.mark.parametrize("text", ENTRIES)
def test_an_entry_is_a_message_or_a_command(text: str) -> None:
    assert parse(text) == ENTRIES[text]


async def entries(reader: Reader) -> list[Command | str]:
    found: list[Command | str] = []
    while True:
        try:
            found.append(parse(await reader.read()))
        except EOFError:
            return found
        except KeyboardInterrupt:
            found.append(INTERRUPT)


def of_lines(data: bytes) -> list[Command | str]:
    return asyncio.run(entries(LineReader(io.BytesIO(data), interactive=False)))


def test_each_line_of_a_pipe_is_an_entry_unless_it_goes_on() -> None:
    data = b'one\nsay """ once\n/set seed 1\r\n'
    data += b'two \\\nlines\n"""\n/three\\\n\nlines\n"""\nlast, without an end'
    assert of_lines(data) == [
        "one",
        'say """ once',
        Command("set", "seed 1"),
        "two \nlines",
        "/three\\\n\nlines",
        "last, without an end",
    ]
    assert of_lines(b"") == []


@pytest.mark.parametrize(
    ("data", "words"),
    [(b'a\n"""\nb\n', "ends within a block"), (b"a\nb\xff\n", "not UTF-8 text at byte 2")],
)
def test_what_is_not_whole_is_refused_and_not_sent(data: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        of_lines(data)


def typed(keys: str) -> list[Command | str]:
    with create_pipe_input() as source:
        source.send_text(keys)
        return asyncio.run(entries(PromptReader(source, DummyOutput())))


END = "\x04"
TYPED: dict[str, tuple[str, list[Command | str]]] = {
    "enter sends": ("one\rtwo\r", ["one", "two"]),
    "alt-enter is a new line": ("one\x1b\r  two\r", ["one\n  two"]),
    "and so is a backslash at the end": ("one\\\rtwo\r", ["one\ntwo"]),
    "but not one in the middle": ("a\\b\r", ["a\\b"]),
    "a paste is one message": (
        "\x1b[200~def f():\r\n    pass \\\r\n\x1b[201~\r",
        ["def f():\n    pass \\"],
    ),
    "a block goes on until it ends": ('"""\ra\r/b\r"""\rc\r', ["a\n/b", "c"]),
    "a pasted docstring is no block": (
        '\x1b[200~"""Doc."""\nimport os\x1b[201~\r',
        ['"""Doc."""\nimport os'],
    ),
    "ctrl-c clears the line": ("wrong\x03right\r", ["right"]),
    "and on an empty line it is told": ("\x03right\r", [INTERRUPT, "right"]),
    "ctrl-d deletes where there is something": ("ab\x1b[D\x04\r", ["a"]),
}


@pytest.mark.parametrize("what", TYPED)
def test_keys_do_what_users_expect(what: str) -> None:
    keys, expected = TYPED[what]
    assert typed(keys + END) == expected
