"""Find the calls of tools in what a model wrote.

A call is JSON with the name of a known tool and its arguments, after the marker of its form or
anywhere else outside quoted code: a marker that is a special token leaves no text. Everything else
stays content, character for character: JSON that the user asked for, calls of unknown tools, and
JSON that is broken or cut off.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass

from llama_runtime.json_values import refuse_constant
from llama_runtime.tools import Tool, ToolDialect


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool.

    Attributes:
        id: "call_" and 24 hexadecimal digits; the tool's answer repeats it as ``tool_call_id``.
        name: the tool.
        arguments: an object as JSON text, as the model wrote it. Unless the call was constrained,
            it may not be what the tool's schema asks for.
    """

    id: str
    name: str
    arguments: str

    def as_dict(self) -> dict[str, object]:
        """The call as it stands in an assistant's message, in the form of OpenAI's API."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What a model wrote, taken apart.

    Attributes:
        content: the text beside the calls, None if there is nothing else; without calls, the whole
            text unchanged.
        tool_calls: the calls, in order.
    """

    content: str | None
    tool_calls: tuple[ToolCall, ...]


def new_call_id() -> str:
    """An id that no other call has."""
    return f"call_{secrets.token_hex(12)}"


def parse_tool_calls(
    text: str,
    dialect: ToolDialect,
    tools: Sequence[Tool],
    *,
    new_id: Callable[[], str] = new_call_id,
) -> ParsedAnswer:
    """Take an answer apart into calls and content.

    Args:
        text: the whole answer; any text is taken.
        dialect: the form in which the model writes calls.
        tools: the tools that count; a call of another one is content.
        new_id: makes the ids, which must differ within a conversation.

    Returns:
        Content and calls, which together hold all of the text but the markers, the separators
        between calls and the white space around them.
    """
    names = {tool.name for tool in tools}
    contents: list[str] = []
    found: list[_Call] = []
    for content, calls in _parts(text, dialect, names):
        contents.append(content)
        found += calls
    if not found:
        return ParsedAnswer(text, ())
    content = "".join(piece for piece in contents if piece.strip(_SEPARATORS)).strip()
    return ParsedAnswer(content or None, tuple(ToolCall(new_id(), *call) for call in found))


def settled_content(text: str, dialect: ToolDialect) -> int:
    """How much of an answer that is still being written is content, whatever comes.

    Args:
        text: the answer so far.
        dialect: the form in which the model writes calls.

    Returns:
        A number of characters: they are the beginning of what ``parse_tool_calls`` gives as the
        content of every text that begins with this one. It ends before the first place where a call
        may begin, so it stays where it is from then on.
    """
    opening, end = _OPENING[dialect], len(text)
    if (match := _START[dialect].search(text)) or (match := _UNFINISHED.search(text)):
        end = match.start()
    for length in range(1, len(opening)):
        if text.endswith(opening[:length]):
            end = min(end, len(text) - length)
    settled = text[:end].rstrip()
    if not settled.strip(_SEPARATORS) or settled[0].isspace():  # if calls follow, it is left out
        return 0
    return len(settled)


_Call = tuple[str, str]  # the tool's name, the arguments
_OPENING: dict[ToolDialect, str] = {"hermes": "<tool_call>", "llama3_json": "<|python_tag|>"}
_START = {
    dialect: re.compile(re.escape(opening) + r'|\{\s*"|\[\s*\{')
    for dialect, opening in _OPENING.items()
}
_UNFINISHED = re.compile(r"[{\[]\s*\Z")  # what may become such JSON
_CLOSING = re.compile(r"\s*</tool_call>")
_SEPARATORS = " \t\n\r;,"
_SEPARATOR = re.compile(r"\s*[;,]?\s*")
_SPACE = re.compile(r"[ \t\n\r]*")  # what JSON allows
_BRACKET_OR_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\]]', re.DOTALL)
_KEYS = {"name", "arguments", "parameters", "type"}


def _parts(text: str, dialect: ToolDialect, names: Set[str]) -> Iterator[tuple[str, list[_Call]]]:
    """Pieces of content, each with the calls that follow it."""
    opening = _OPENING[dialect]
    kept = at = 0  # where this piece of content begins; where to look on
    marker = 0  # the next one
    in_code = False
    while match := _START[dialect].search(text, at):
        start, body = match.span()
        is_marked = match[0] == opening
        if text.count("`", at, start) % 2:
            in_code = not in_code
        if marker < body:
            marker = _find(text, opening, body)
        if in_code and not is_marked:
            at = body
            continue
        block = _read_block(text, body if is_marked else start, dialect, names, is_marked)
        if block is not None:
            yield text[kept:start], block[0]
            kept = at = block[1]
            in_code = False
        else:
            at = marker if is_marked else _end_of_json(text, start, marker)
    yield text[kept:], []


def _read_block(
    text: str, at: int, dialect: ToolDialect, names: Set[str], is_marked: bool
) -> tuple[list[_Call], int] | None:
    """The calls that begin at a place and where they end, None if there are none.

    Between markers there may be nothing else; the closing one may be missing at the end.
    """
    calls, end = _read_run(text, at, names)
    if not calls:
        return None
    if dialect == "llama3_json":
        return calls, end
    if closing := _CLOSING.match(text, end):
        return calls, closing.end()
    rest = _skip(_SPACE, text, end)
    is_over = rest == len(text) or text.startswith(_OPENING[dialect], rest)
    return (calls, end) if is_over or not is_marked else None


def _read_run(text: str, at: int, names: Set[str]) -> tuple[list[_Call], int]:
    """As many calls as follow each other, and where the last one ends."""
    calls: list[_Call] = []
    end = at
    at = _skip(_SPACE, text, at)
    try:
        while True:
            more, end = _read_calls(text, at, names)
            calls += more
            at = _skip(_SEPARATOR, text, end)
    except (ValueError, RecursionError):
        return calls, end


def _read_calls(text: str, at: int, names: Set[str]) -> tuple[list[_Call], int]:
    """A call or a list of calls, and where it ends.

    Raises:
        ValueError: there is something else.
    """
    if not text.startswith("[", at):
        call, end = _read_call(text, at, names)
        return [call], end
    calls: list[_Call] = []
    end = at
    while text.startswith("," if calls else "[", end):
        call, end = _read_call(text, _skip(_SPACE, text, end + 1), names)
        calls.append(call)
        end = _skip(_SPACE, text, end)
    return calls, _expect(text, "]", end)


def _read_call(text: str, at: int, names: Set[str]) -> tuple[_Call, int]:
    members: dict[str, tuple[object, str]] = {}
    end = at
    while text.startswith("," if members else "{", end):
        key, end = _JSON.raw_decode(text, _skip(_SPACE, text, end + 1))
        if not isinstance(key, str) or key not in _KEYS or key in members:
            raise ValueError("not a key of a call")
        value_at = _skip(_SPACE, text, _expect(text, ":", _skip(_SPACE, text, end)))
        value, end = _JSON.raw_decode(text, value_at)
        members[key] = (value, text[value_at:end])
        end = _skip(_SPACE, text, end)
    end = _expect(text, "}", end)
    return _call(members, names), end


def _call(members: dict[str, tuple[object, str]], names: Set[str]) -> _Call:
    name, _ = members.pop("name", (None, ""))
    kind, _ = members.pop("type", ("function", ""))
    if kind != "function" or not isinstance(name, str) or name not in names:
        raise ValueError("not a call of a known tool")
    ((value, arguments),) = members.values()  # spelled either way, once
    if isinstance(value, str):
        arguments = value
        arguments.encode("utf-8")  # half of a surrogate pair can be written as an escape only
        value = _JSON.decode(arguments)
    if isinstance(value, dict):
        return name, arguments
    raise ValueError("arguments have names")


def _end_of_json(text: str, start: int, limit: int) -> int:
    """Where JSON that is no call ends: at its last bracket, or at the limit if it is broken."""
    try:
        return _JSON.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        pass
    depth = 0
    for match in _BRACKET_OR_STRING.finditer(text, start, limit):
        if match[0] in "{[":
            depth += 1
        elif match[0] in "}]":
            depth -= 1
            if depth == 0:
                return match.end()
    return limit


def _find(text: str, part: str, start: int) -> int:
    found = text.find(part, start)
    return len(text) if found < 0 else found


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _expect(text: str, character: str, at: int) -> int:
    if not text.startswith(character, at):
        raise ValueError(f"no {character!r}")
    return at + 1


# Nobody computes with the numbers, and Python's integers refuse thousands of digits.
_JSON = json.JSONDecoder(parse_int=float, parse_constant=refuse_constant)
