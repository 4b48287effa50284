"""Turn a conversation into a prompt with the model's own chat template.

Chat templates are Jinja, written by whoever made the model: programs of somebody else. They are
rendered by ``template_renderer`` in a process of their own, where they see copies of the messages
and have limits of time and memory. What they need beyond those is one error of the request, and the
next request finds a new process.

One difference from ``transformers``, the reference, is known: ``trim`` and ``strip`` leave U+001C
to U+001F alone, which Python counts as white space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from llama_runtime.errors import BundleError, RequestError, one_line
from llama_runtime.template_process import ask
from llama_runtime.template_renderer import CPU_SECONDS, FUEL, MEMORY_BYTES

MAX_SOURCE_CHARACTERS = 2**18  # the longest that are published have a tenth
_OVER_LIMIT = f"more than {CPU_SECONDS:g} s or {MEMORY_BYTES // 2**20} MB"


class ChatTemplate:
    """A compiled chat template; safe to share between threads.

    Args:
        source: the Jinja source.
        special_tokens: text of the special tokens by the name the template has for them,
            such as ``bos_token``.

    Raises:
        BundleError: if the source doesn't compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise BundleError(
                f"the chat template has {len(source):,} characters and may have "
                f"{MAX_SOURCE_CHARACTERS:,} at most"
            )
        self._source = source
        self._special_tokens: dict[str, object] = dict(special_tokens)
        answer = ask(source, None)
        if answer is None:
            raise BundleError(f"the chat template doesn't compile: it needs {_OVER_LIMIT}")
        if "error" in answer:
            raise BundleError(f"the chat template doesn't compile: {one_line(answer['error'])}")

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """Write a conversation as a prompt.

        Args:
            messages: the turns; each has a ``role`` and a ``content``, both text, and whatever
                else the template reads.
            add_generation_prompt: whether to open the assistant's next turn.
            tools: JSON schemas of the tools the model may call; None for none.

        Returns:
            The prompt, special tokens written out: for `Tokenizer.encode_templated`.

        Raises:
            RequestError: if the messages aren't well formed, or the template refuses them.
        """
        _check_messages(messages)
        variables = self._special_tokens | {
            "messages": _plain(messages, "messages"),
            "tools": None if tools is None else _plain(tools, "tools"),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        answer = ask(self._source, variables)
        if answer is None:
            problem = f"the chat template needs {_OVER_LIMIT}: shorten the messages"
        elif "text" in answer:
            return answer["text"]
        elif answer["kind"] == "refused":
            problem = f"the chat template refuses these messages: {one_line(answer['error'])}"
        elif answer["kind"] == "fuel":
            problem = f"the chat template needs more than {FUEL} steps: shorten the messages"
        else:
            problem = f"the chat template can't render these messages: {one_line(answer['error'])}"
        raise RequestError(problem, param="messages")


def _check_messages(messages: object) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages must be a list of turns, not {type(messages).__name__}", param="messages"
        )
    if not messages:
        raise RequestError("messages is empty; at least one turn is needed", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"messages[{index}] must be an object with 'role' and 'content', "
                f"not {type(message).__name__}",
                param="messages",
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = type(message[key]).__name__ if key in message else "missing"
                raise RequestError(
                    f"messages[{index}] needs a text as '{key}'; it is {found}", param="messages"
                )


def _plain(value: Sequence[Mapping[str, object]], param: str) -> object:
    """A copy in which there is nothing but JSON values."""
    try:
        text = json.dumps([dict(item) for item in value], ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
        return json.loads(text)
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} holds a lone surrogate, U+{ord(text[error.start]):04X}: "
            "it can't be written as UTF-8, so remove it",
            param=param,
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{param} must hold JSON values only: {error}", param=param) from error
