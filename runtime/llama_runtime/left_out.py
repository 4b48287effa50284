"""Find what a chat template leaves out without a word.

Some templates know a few roles and skip messages of others; some don't know tools. What they leave
out the model never sees, and nobody is told. So where that could happen, the conversation is
rendered once more with numbers nobody can guess in it, which must come out again.
"""

from __future__ import annotations

import copy
import secrets
from typing import Any

from llama_runtime.conversation import Conversation

_ALWAYS_WRITTEN = {"user", "assistant"}  # a template without these is no chat template


class Probes:
    """A conversation with a number in each place that a template could leave out.

    Args:
        conversation: what is asked for; it isn't changed.

    Attributes:
        conversation: the copy to render; None if there is no such place.
    """

    def __init__(self, conversation: Conversation) -> None:
        self._numbers: list[tuple[str, str, str]] = []
        probed = copy.deepcopy(conversation)
        for index, message in enumerate(probed.messages):
            if message["role"] not in _ALWAYS_WRITTEN:
                what = f"messages[{index}] has the role {message['role']!r}"
                message["content"] = self._number(what, "messages")
            for number, call in enumerate(_objects(message.get("tool_calls"))):
                _named(call)["name"] = self._number(
                    f"messages[{index}] has the tool call {number}", "messages"
                )
        for number, tool in enumerate(_objects(probed.tools)):
            _named(tool)["name"] = self._number(f"there is tools[{number}]", "tools")
        self.conversation = probed if self._numbers else None

    def missing_from(self, prompt: str) -> tuple[str, str] | None:
        """What isn't in the copy's rendering, and the parameter it came in; None if all is."""
        for what, param, number in self._numbers:
            if number not in prompt:
                return what, param
        return None

    def _number(self, what: str, param: str) -> str:
        """Digits, which no filter of a template changes."""
        number = f"{secrets.randbelow(10**18):018d}"
        self._numbers.append((what, param, number))
        return number


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _named(tool: dict[str, Any]) -> dict[str, Any]:
    """The object that holds a tool's name, in either form that templates take."""
    function = tool.get("function")
    return function if isinstance(function, dict) else tool
