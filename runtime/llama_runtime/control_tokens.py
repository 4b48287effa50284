"""Tell the control tokens that a chat template writes from those that somebody typed.

In a rendered prompt they look alike. So what came in with the messages is marked before it is
rendered: single characters of it are replaced by private-use ones, which leaves every length as it
is, and a control token in the prompt that holds no mark is the template's own.

A conversation is marked in two ways. *Exact* marks the control tokens that are written out in it;
otherwise the template sees what was sent, so its prompt is the one that ``transformers`` renders.
*Opaque* marks all of which a control token could be put together: a template that cuts a piece out
of a text, or writes a ``>`` behind it, can make ``<|eot_id|>`` of something that wasn't. If both
prompts have the same control tokens, the exact one is right, else the opaque one.

What is left open is a template that cuts a word out of a longer text and writes the rest of a
control token around it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from enum import Enum, auto
from typing import Any

from llama_runtime.conversation import Conversation
from llama_runtime.errors import RequestError

_PRIVATE_USE = range(0xE000, 0xF900)
# A role reaches the template as it is, because it is compared. These are a part of control tokens
# on purpose, such as <|user|>; another one that is could be somebody's try.
_KNOWN_ROLES = {"system", "user", "assistant", "tool", "developer", "function", "ipython"}

Change = Callable[[str], str]


class ControlTokens:
    """The control tokens of a tokenizer, as texts.

    Args:
        special: texts of its special tokens.
        ordinary: texts of its other added tokens, which are found in a prompt in the same way.
    """

    def __init__(self, special: Iterable[str], ordinary: Iterable[str] = ()) -> None:
        self._special = frozenset(special)
        self._added = re.compile(_any_of({*self._special, *ordinary}))
        self._starts = re.compile(f"(?=(?:{_any_of(self._special)}))")
        edges = {text[place] for text in self._special for place in (0, -1)}
        self._edges = re.compile(_any_of(edges))
        self._key_edges = re.compile(_any_of({edge for edge in edges if not edge.isalnum()}))

    def split(self, prompt: str) -> list[str]:
        """A prompt cut at its control tokens: texts at even places, control tokens at odd ones."""
        pieces, end = [], 0
        for match in self._added.finditer(prompt):
            if match.group() in self._special:
                pieces += [prompt[end : match.start()], match.group()]
                end = match.end()
        return [*pieces, prompt[end:]]

    def check_roles(self, conversation: Conversation) -> None:
        """Refuse a role of which a template could make a control token.

        Raises:
            RequestError: names the message and the token.
        """
        for index, message in enumerate(conversation.messages):
            role = message["role"].casefold()
            for token in self._special if role not in _KNOWN_ROLES else ():
                if role in token.casefold() or token.casefold() in role:
                    raise RequestError(
                        f"messages[{index}] has the role {message['role']!r}, which could become "
                        f"the control token {token!r}: give it another role",
                        param="messages",
                    )

    def mark_exact(self, text: str, mark: Change) -> str:
        """Mark the first character of each control token in a text."""
        starts = {match.start() for match in self._starts.finditer(text)}
        if not starts:
            return text
        return "".join(mark(one) if place in starts else one for place, one in enumerate(text))

    def mark_opaque(self, text: str, mark: Change) -> str:
        """Mark a text so that nothing of it can become a part of a control token."""
        word = text.strip()
        if word and any(word in token for token in self._special):
            return "".join(one if one.isspace() else mark(one) for one in text)
        return self._edges.sub(lambda match: mark(match.group()), text)

    def mark_opaque_key(self, key: str, mark: Change) -> str:
        """The same for a key that the template may ask for, whose letters must stay."""
        return self._key_edges.sub(lambda match: mark(match.group()), key)


class MarkedConversation:
    """A conversation in both markings, and what undoes them.

    Args:
        conversation: what is asked for; it isn't changed.
        control: what is to be marked.

    Attributes:
        exact: control tokens in it are marked.
        opaque: whatever could become a part of one is marked.
        has_marks: whether anything is.

    Raises:
        RequestError: the conversation leaves no private-use character to mark with.
    """

    def __init__(self, conversation: Conversation, control: ControlTokens) -> None:
        self._unused = _unused_characters(conversation)
        self._marks: dict[str, str] = {}

        def exact(text: str) -> str:
            return control.mark_exact(text, self._mark)

        def opaque(text: str) -> str:
            return control.mark_opaque(text, self._mark)

        def opaque_key(key: str) -> str:
            return control.mark_opaque_key(key, self._mark)

        self.opaque = _changed(conversation, opaque, opaque_key)
        self.has_marks = bool(self._marks)
        self.exact = _changed(conversation, exact, exact) if self.has_marks else conversation

    def unmark(self, text: str) -> str:
        """Put the marked characters back, also where a mark was escaped as JSON and Python do."""
        originals = dict(zip(self._marks.values(), self._marks, strict=True))
        for mark, character in list(originals.items()):
            originals[_escaped(mark)] = json.dumps(character)[1:-1]
        return re.sub(_any_of(originals), lambda match: originals[match.group()], text)

    def _mark(self, character: str) -> str:
        if character not in self._marks:
            mark = next(self._unused, None)
            if mark is None:
                raise RequestError(
                    "the messages hold so many private-use characters, U+E000 to U+F8FF, that "
                    "control tokens in them can't be marked: remove some",
                    param="messages",
                )
            self._marks[character] = mark
        return self._marks[character]


def _any_of(texts: Iterable[str]) -> str:
    """A pattern that finds the longest of these texts at each place; nothing if there are none."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return "|".join(map(re.escape, longest_first)) or "(?!)"


def _unused_characters(conversation: Conversation) -> Iterator[str]:
    text = json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)
    first = secrets.randbelow(len(_PRIVATE_USE))
    for code in (*_PRIVATE_USE[first:], *_PRIVATE_USE[:first]):
        if chr(code) not in text and _escaped(chr(code)) not in text:
            yield chr(code)


def _escaped(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


class _Keys(Enum):
    """Whose the keys of an object are."""

    FORMAT = auto()  # the message format's; a template asks for them
    NAMES = auto()  # somebody's own, and below them the format's
    ALL_NAMES = auto()  # somebody's own, at every depth


def _changed(conversation: Conversation, change: Change, change_key: Change) -> Conversation:
    """A copy in which all texts but roles are changed, and keys."""

    def changed(value: Any, keys: _Keys) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list):
            return [changed(item, keys) for item in value]
        if isinstance(value, dict):
            rename = change_key if keys is _Keys.FORMAT else change
            return {rename(key): changed(item, below(key, keys)) for key, item in value.items()}
        return value

    def below(key: str, keys: _Keys) -> _Keys:
        if keys is _Keys.ALL_NAMES or (keys is _Keys.FORMAT and key == "arguments"):
            return _Keys.ALL_NAMES
        return _Keys.NAMES if keys is _Keys.FORMAT and key == "properties" else _Keys.FORMAT

    messages = []
    for message in conversation.messages:
        copy = {
            change_key(key): value if key == "role" else changed(value, below(key, _Keys.FORMAT))
            for key, value in message.items()
        }
        messages.append(copy)
    return Conversation(messages, changed(conversation.tools, _Keys.FORMAT))
