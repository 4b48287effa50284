"""Conversations that a bundle brings with it, and the prompts that ``transformers`` makes of them.

Templates are rendered by another program here than where their authors tried them. So whoever
builds a bundle renders a few conversations with the reference, and whoever opens it renders them
again: one that comes out otherwise means that all prompts may, and the bundle isn't used.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import takewhile
from typing import Any

from llama_runtime.chat_template import ChatTemplate
from llama_runtime.conversation import read_conversation
from llama_runtime.errors import BundleError, RequestError, one_line

MAX_CASES = 64
MAX_SECONDS = 10.0  # 0.01 s is usual; a template may take 0.5 s for each
_SHOWN = 40  # characters of each text at a difference


@dataclass(frozen=True, slots=True)
class ChatCase:
    """One conversation and its prompt.

    Attributes:
        name: what is special about it.
        messages: see `ChatTemplate.render`.
        tools: see there.
        add_generation_prompt: see there.
        prompt: what the reference renders; None if it refuses the conversation.
    """

    name: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    prompt: str | None


@dataclass(frozen=True, slots=True)
class ChatFixture:
    """What ``chat_fixture.json`` holds.

    Attributes:
        rendered_by: the reference, for people.
        now: the time at which it rendered, which templates may ask for.
        cases: the conversations.
    """

    rendered_by: str
    now: datetime
    cases: Sequence[ChatCase]

    def to_json(self) -> str:
        """The text of the file."""
        document = asdict(self) | {"now": self.now.isoformat()}
        return json.dumps(document, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ChatFixture:
        """Read the text of the file.

        Raises:
            BundleError: if it isn't what ``to_json`` writes.
        """
        try:
            document = json.loads(text)
            cases = [_case(**case) for case in document["cases"]]
            now = datetime.fromisoformat(document["now"])
            fixture = cls(str(document["rendered_by"]), now, cases)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise BundleError(
                f"chat_fixture.json is not what llama-export build writes: {one_line(error, 80)}"
            ) from error
        if len(cases) > MAX_CASES:
            raise BundleError(f"chat_fixture.json has {len(cases)} cases; {MAX_CASES} is the limit")
        return fixture

    def check(self, template: ChatTemplate) -> None:
        """Render every conversation.

        Raises:
            BundleError: a prompt isn't that of the reference; names the conversation and the first
                difference.
        """
        end = time.monotonic() + MAX_SECONDS
        for case in self.cases:
            prompt = _render(template, case, self.now)
            if prompt != case.prompt:
                raise BundleError(
                    f"the chat template doesn't write the conversation {one_line(case.name, 80)!r} "
                    f"as {one_line(self.rendered_by, 80)} does: {_difference(prompt, case.prompt)}"
                )
            if time.monotonic() > end:
                raise BundleError(
                    f"the chat template needs more than {MAX_SECONDS:g} s for the "
                    f"{len(self.cases)} conversations of chat_fixture.json"
                )


def _case(
    name: object, prompt: object, add_generation_prompt: object, **conversation: Any
) -> ChatCase:
    """A case whose parts are of their types; the conversation is looked at when it is rendered."""
    if (
        not isinstance(name, str)
        or not isinstance(prompt, str | None)
        or not isinstance(add_generation_prompt, bool)
    ):
        raise TypeError("a case has a name, a prompt or null, and whether an answer is opened")
    return ChatCase(
        name=name, prompt=prompt, add_generation_prompt=add_generation_prompt, **conversation
    )


def _render(template: ChatTemplate, case: ChatCase, now: datetime) -> str | None:
    try:
        return template.render_conversation(
            read_conversation(case.messages, case.tools),
            add_generation_prompt=case.add_generation_prompt,
            now=now,
        )
    except RequestError:
        return None


def _difference(prompt: str | None, expected: str | None) -> str:
    if prompt is None or expected is None:
        return f"it {'refuses' if prompt is None else 'takes'} the conversation"
    pairs = zip(prompt, expected, strict=False)
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    found, wanted = (repr(text[start : start + _SHOWN]) for text in (prompt, expected))
    return f"from character {start} on it has {one_line(found)}, not {one_line(wanted)}"
